/* What the files of the grouped pass share.
 *
 * Weights lie in panels of PANEL output channels: panel p of a matrix [O, K] holds the channels p * PANEL .. of every input channel,
 * one input channel after the other (float32, float16), or two by two: the two inputs of a channel side by side (bfloat16, int8),
 * as AMX and AVX-512 BF16 multiply them. O and K are padded with zeros to multiples of PANEL.
 * Rows lie in tiles: of `tile` rows, 64 bytes of each, then the next 64 bytes of each.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PANEL 32
#define MAX_BLOCK 256 /* rows that meet a panel while it is in the cache */

typedef uint16_t bf16;
typedef uint16_t f16;

enum type { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum function { SWIGLU, SWIGLU_POST, SWIGLUOAI, GEGLU, GEGLU_TANH, GELU, RELU, RELU2 };

/* What stands between the projections: experts/activations.py says what they compute. limit: of the first three, INFINITY = none. */
struct activation {
    enum function function;
    float limit;
};

/* The result of one panel for the rows of one tile, before scale and bias. */
struct sums {
    int rows;
    const float *gate, *up; /* [rows, PANEL]; up NULL where the activation is not gated */
};

/* What is known of the output channels of one panel; NULL = 1, or 0. */
struct channels {
    const float *scale, *bias;
};

struct kernel {
    const char *name;
    int tile, row_bytes; /* rows in a tile; bytes of a number in a row */
    /* c [count, PANEL] = a [count, depth] b [depth, PANEL] in float32, for each type of weights; count <= MAX_BLOCK; NULL = cannot.
     * next: the panel that comes after b, or NULL; `decoded` has room for a panel in the type of rows. */
    void (*multiply[4])(int count, const void *a, const void *b, int64_t depth, float *c, const void *next, void *decoded);
    /* to the tiles that the second projection reads: `at` is where the first row's channels of this panel begin */
    void (*activate)(struct activation, struct sums, struct channels gate, struct channels up, void *at);
    /* out[index[r]] += weights[r] * (c[r] * scale + bias), `width` channels */
    void (*add)(struct sums, struct channels, int width, const int64_t *index, const float *weights, int64_t stride, float *out);
    void (*begin)(void), (*end)(void); /* around all calls of one thread */
};

/* What is asked for of the next panel while this one is multiplied, so that memory and arithmetic overlap: of every RUN_LINES lines of it,
 * each group of rows asks for its share. One group alone is done before its own panel is there: it asks for nothing. */
#define RUN_LINES 32

struct ahead {
    const char *first;
    int lines;
};

static inline struct ahead share_of(const void *next, int group, int groups)
{
    int lines = (RUN_LINES + groups - 1) / groups, left = RUN_LINES - group * lines;
    if (!next || groups == 1 || left <= 0)
        return (struct ahead){NULL, 0};
    return (struct ahead){(const char *)next + group * lines * 64, lines < left ? lines : left};
}

static inline __attribute__((always_inline)) void ask_for(struct ahead ahead, int64_t run)
{
    for (int line = 0; line < ahead.lines; line++)
        __builtin_prefetch(ahead.first + (run * RUN_LINES + line) * 64, 0, 2);
}

static inline float from_bf16(bf16 x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float from_f16(f16 x)
{
    uint32_t exponent = x >> 10 & 31, fraction = x & 1023, bits;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        return x >> 15 ? -value : value;
    }
    bits = exponent == 31 ? 0x7f800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    bits |= (uint32_t)(x >> 15) << 31;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to nearest even; NaN stays NaN. */
static inline bf16 to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (bf16)(bits >> 16 | 0x40);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The kernel of that name for weights of that type; NULL where there is none, or this processor cannot run it. */
const struct kernel *find_kernel(const char *name, int type);
