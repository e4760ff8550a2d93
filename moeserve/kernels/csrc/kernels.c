/* The kernels there are, from the widest to the one that runs everywhere. */
#include "kernels.h"

#define AHEAD 1024 /* bytes by which weights are asked for before they are multiplied */

static void nothing(void) {}

#define ISA(x) x##_generic
#define VECTOR 4
#define MR 3
#define WIDTH 8
#define HALVES(p) halves_generic(p)
typedef float four __attribute__((vector_size(16)));
static inline four halves_generic(const f16 *p)
{
    four wide;
    for (int i = 0; i < 4; i++)
        wide[i] = from_f16(p[i]);
    return wide;
}
#include "isa.h"
const struct kernel generic_kernel = {
    "generic", 12, 4, {multiply_float32_generic, multiply_bfloat16_generic, multiply_float16_generic, multiply_int8_generic, multiply_e4m3_generic},
    activate_generic, add_generic, nothing, nothing,
};

#ifdef __x86_64__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define ISA(x) x##_avx2
#define VECTOR 8
#define MR 6
#define WIDTH 16
#define HALVES(p) (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#include "isa.h"
#pragma GCC pop_options
const struct kernel avx2_kernel = {
    "avx2", 12, 4, {multiply_float32_avx2, multiply_bfloat16_avx2, multiply_float16_avx2, multiply_int8_avx2, multiply_e4m3_avx2},
    activate_avx2, add_avx2, nothing, nothing,
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
#define ISA(x) x##_avx512
#define VECTOR 16
#define MR 12
#define WIDTH 32
#define HALVES(p) (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#include "isa.h"
const struct kernel avx512_kernel = {
    "avx512", 12, 4, {multiply_float32_avx512, multiply_bfloat16_avx512, multiply_float16_avx512, multiply_int8_avx512, multiply_e4m3_avx512},
    activate_avx512, add_avx512, nothing, nothing,
};

/* 8 bits to bfloat16 is exact, so what is stored in them is decoded and multiplied as bfloat16; 32 numbers at a time. */
static inline __m512i two_int8(const void *codes)
{
    const __m128i *both = codes;
    __m512i low = (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(both)));
    __m512i high = (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(both + 1)));
    const __m512i upper_halves = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(low, upper_halves, high);
}

static inline __m512i two_e4m3(const void *codes)
{
    /* 0, 1, .. 7 times 2^-9, which have no implicit one */
    const __m512i tiny = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
    __m512i sign = _mm512_slli_epi16(_mm512_and_si512(byte, _mm512_set1_epi16(0x80)), 8);
    __m512i normal = _mm512_slli_epi16(_mm512_and_si512(byte, _mm512_set1_epi16(0x7f)), 4);
    normal = _mm512_add_epi16(normal, _mm512_set1_epi16(120 << 7));
    __mmask32 is_tiny = _mm512_testn_epi16_mask(byte, _mm512_set1_epi16(0x78));
    return _mm512_or_si512(_mm512_mask_permutexvar_epi16(normal, is_tiny, byte, tiny), sign);
}

typedef __m512i decoder(const void *codes);

static inline __attribute__((always_inline)) const bf16 *decode_panel(decoder *two, const void *codes, int64_t count, bf16 *decoded)
{
    for (int64_t i = 0; i < count; i += 32)
        _mm512_storeu_si512(decoded + i, two((const uint8_t *)codes + i));
    return decoded;
}

#pragma GCC push_options
#pragma GCC target("avx512bf16")
typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));
static inline __attribute__((always_inline)) vec16 dot_bf16(vec16 acc, const bf16 *a, const bf16 *b, int v)
{
    int both;
    memcpy(&both, a, 4);
    return (vec16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(both), (__m512bh)_mm512_loadu_si512(b + 2 * v * 16));
}
#define NAME(x) x##_dot
#define A bf16
#define B bf16
#define STEP 2
#define DOT dot_bf16
#define MR 12
#define WIDTH 32
#define VECTOR 16
#define TILE 12
#define vec vec16
#include "tile.h"
#undef MR
#undef WIDTH
#undef VECTOR
#undef TILE
#undef vec
static void multiply_int8_dot(int count, const void *a, const void *b, int64_t depth, float *c, const void *next, void *decoded)
{
    multiply_dot(count, a, decode_panel(two_int8, b, depth * PANEL, decoded), depth, c, NULL, NULL);
}

static void multiply_e4m3_dot(int count, const void *a, const void *b, int64_t depth, float *c, const void *next, void *decoded)
{
    multiply_dot(count, a, decode_panel(two_e4m3, b, depth * PANEL, decoded), depth, c, NULL, NULL);
}

/* Rows in bfloat16: a panel is one run of 32 numbers. */
static inline void activate_bf16(
    int tile, struct activation activation, struct sums sums, struct channels gate, struct channels up, bf16 *at)
{
    for (int r = 0; r < sums.rows; r++) {
        __m512 y[2];
        for (int v = 0; v < 2; v++) {
            vec_avx512 x = finished_avx512(sums.gate + r * PANEL, gate, v);
            y[v] = (__m512)activated_avx512(activation, x, sums.up ? finished_avx512(sums.up + r * PANEL, up, v) : x);
        }
        _mm512_storeu_si512(at + r * 32, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
    }
}
static void activate_dot(struct activation activation, struct sums sums, struct channels gate, struct channels up, void *at)
{
    activate_bf16(12, activation, sums, gate, up, at);
}
const struct kernel avx512_bf16_kernel = {
    "avx512_bf16", 12, 2, {NULL, multiply_dot, NULL, multiply_int8_dot, multiply_e4m3_dot}, activate_dot, add_avx512, nothing, nothing,
};

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
struct tile_sizes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
static _Thread_local int configured; /* how many rows of two tiles */

/* Tiles 0-1 and 2-3 hold sums of the first and the second 16 rows, 4 and 5 these rows, 6 and 7 weights. */
static void configure(int count)
{
    if (configured == count)
        return;
    struct tile_sizes sizes = {.palette = 1};
    for (int i = 0; i < 8; i++)
        sizes.bytes[i] = 64, sizes.rows[i] = 16;
    sizes.rows[0] = sizes.rows[1] = sizes.rows[4] = count < 16 ? count : 16;
    sizes.rows[2] = sizes.rows[3] = sizes.rows[5] = count > 16 ? count - 16 : 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(sizes));
    configured = count;
}

static void one_tile(const bf16 *a, const bf16 *b, int64_t depth, float *c, struct ahead ahead)
{
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < depth; k += 32, a += 16 * 32, b += 32 * PANEL) {
        ask_for(ahead, k / 32);
        _tile_loadd(6, b, 128);
        _tile_loadd(7, b + 32, 128);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(1, c + 16, 4 * PANEL);
}

static void two_tiles(const bf16 *a, const bf16 *b, int64_t depth, float *c, struct ahead ahead)
{
    const bf16 *second = a + 16 * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32, a += 16 * 32, second += 16 * 32, b += 32 * PANEL) {
        ask_for(ahead, k / 32);
        _tile_loadd(6, b, 128);
        _tile_loadd(7, b + 32, 128);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, second, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(1, c + 16, 4 * PANEL);
    _tile_stored(2, c + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, c + 16 * PANEL + 16, 4 * PANEL);
}

static void multiply_amx(int count, const void *rows, const void *panel, int64_t depth, float *c, const void *next, void *decoded)
{
    const bf16 *a = rows;
    int groups = (count + 31) / 32;
    for (int group = 0; group < groups; group++, count -= 32, a += 32 * depth, c += 32 * PANEL) {
        configure(count < 32 ? count : 32);
        (count > 16 ? two_tiles : one_tile)(a, panel, depth, c, share_of(next, group, groups));
    }
}

/* Up to 32 rows: 32 input channels are decoded while those before them are multiplied, and never leave the first-level cache. */
static inline __attribute__((always_inline)) void multiply_bytes_amx(
    decoder *two, int count, const bf16 *a, const uint8_t *codes, int64_t depth, float *c, bf16 *decoded)
{
    if (count > 32) {
        multiply_amx(count, a, decode_panel(two, codes, depth * PANEL, decoded), depth, c, NULL, NULL);
        return;
    }
    const bf16 *second = a + 16 * depth;
    configure(count);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    decode_panel(two, codes, depth ? 32 * PANEL : 0, decoded); /* a shard of a narrow expert may have no channels */
    for (int64_t k = 0; k < depth; k += 32, a += 16 * 32, second += 16 * 32) {
        const bf16 *b = decoded + k / 32 % 2 * 32 * PANEL;
        if (k + 32 < depth)
            decode_panel(two, codes + (k + 32) * PANEL, 32 * PANEL, decoded + (k / 32 + 1) % 2 * 32 * PANEL);
        _tile_loadd(6, b, 128);
        _tile_loadd(7, b + 32, 128);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (count > 16) {
            _tile_loadd(5, second, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(1, c + 16, 4 * PANEL);
    if (count > 16) {
        _tile_stored(2, c + 16 * PANEL, 4 * PANEL);
        _tile_stored(3, c + 16 * PANEL + 16, 4 * PANEL);
    }
}
static void multiply_int8_amx(int count, const void *a, const void *b, int64_t depth, float *c, const void *next, void *decoded)
{
    multiply_bytes_amx(two_int8, count, a, b, depth, c, decoded);
}
static void multiply_e4m3_amx(int count, const void *a, const void *b, int64_t depth, float *c, const void *next, void *decoded)
{
    multiply_bytes_amx(two_e4m3, count, a, b, depth, c, decoded);
}
static void activate_amx(struct activation activation, struct sums sums, struct channels gate, struct channels up, void *at)
{
    activate_bf16(16, activation, sums, gate, up, at);
}
static void begin_amx(void) { configured = 0; }
static void end_amx(void) { _tile_release(); }
const struct kernel amx_kernel = {
    "amx", 16, 2, {NULL, multiply_amx, NULL, multiply_int8_amx, multiply_e4m3_amx}, activate_amx, add_avx512, begin_amx, end_amx,
};
#pragma GCC pop_options
#pragma GCC pop_options
#pragma GCC pop_options

/* Linux lends the tiles only to processes that ask. */
static int may_use_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static int is_there(const struct kernel *kernel)
{
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    int dot = avx512 && __builtin_cpu_supports("avx512bf16");
    if (kernel == &amx_kernel)
        return dot && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
    return kernel == &avx512_bf16_kernel ? dot : kernel == &avx512_kernel ? avx512 : kernel == &avx2_kernel ? avx2 : 1;
}
static const struct kernel *const all[] = {&amx_kernel, &avx512_bf16_kernel, &avx512_kernel, &avx2_kernel, &generic_kernel};
#else
static int is_there(const struct kernel *kernel) { return 1; }
static const struct kernel *const all[] = {&generic_kernel};
#endif

const struct kernel *find_kernel(const char *name, int type)
{
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i]->name, name) && all[i]->multiply[type] && is_there(all[i]))
            return all[i];
    return NULL;
}
