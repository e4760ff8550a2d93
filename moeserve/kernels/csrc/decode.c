/* Weights in 8 or 4 bits -> the numbers they stand for, a tile at a time, just before it is multiplied.
 *
 * Loops are plain C that the compiler turns into vectors, once for each instruction set.
 */
#include "kernels.h"
#include <omp.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_ISA
#endif
#define INLINE static inline __attribute__((always_inline))

#define ALONE (1 << 16) /* up to so many numbers, waking other threads takes longer than they save */

enum code { CODE_INT8, CODE_E4M3, CODE_E5M2, CODE_INT4, CODE_E2M1 };

/* [rows, bytes] of codes. Rows (row + row_cut) / row_size have scales [groups], of which column c takes number index[c], or, where that is
 * NULL, c / group_size; zeros are alike, or NULL. Columns are in the order of the numbers: of 4 bits, the low halves of all bytes come first. */
struct coded {
    int32_t code, to_bf16;
    int64_t first_row, rows, bytes;
    const uint8_t *codes;
    const float *scales; /* NULL = 1 */
    const int8_t *zeros;
    int64_t groups, group_size, row_size, row_cut;
    const int32_t *index;
    void *out;
    int32_t num_threads;
};

INLINE float number(enum code code, uint32_t byte, int half)
{
    uint32_t four = half ? byte >> 4 : byte & 15;
    switch (code) {
    case CODE_INT8: return (float)(int8_t)byte;
    case CODE_E4M3: return small_float(byte, 20, 120);
    case CODE_E5M2: return small_float(byte, 21, 112);
    case CODE_INT4: return (float)((int32_t)(four << 28) >> 28);
    case CODE_E2M1: {
        uint32_t magnitude = four & 7, half_or_none = -magnitude & 0x3f000000; /* of 1 and 0 */
        return as_float((magnitude > 1 ? (magnitude << 22) + 0x3f000000 : half_or_none) | (four & 8) << 28);
    }
    }
    return 0;
}

INLINE void store(void *out, int64_t at, float value, int is_bf16)
{
    if (is_bf16) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((bf16 *)out)[at] = (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else
        ((float *)out)[at] = value;
}

INLINE void decode_row(enum code code, int is_bf16, int64_t bytes, const uint8_t *codes, const float *scale, const float *zero, void *out)
{
    for (int half = 0; half < (code >= CODE_INT4 ? 2 : 1); half++)
        for (int64_t i = 0; i < bytes; i++) {
            int64_t at = half * bytes + i;
            float value = number(code, codes[i], half);
            if (zero)
                value -= zero[at];
            store(out, at, scale ? value * scale[at] : value, is_bf16);
        }
}

#define DECODE(name, code)                                                                                                              \
    EVERY_ISA static void name##_float32(int64_t n, const uint8_t *c, const float *s, const float *z, void *out)                       \
    {                                                                                                                                   \
        if (!s) decode_row(code, 0, n, c, NULL, NULL, out);                                                                             \
        else if (!z) decode_row(code, 0, n, c, s, NULL, out);                                                                           \
        else decode_row(code, 0, n, c, s, z, out);                                                                                      \
    }                                                                                                                                   \
    EVERY_ISA static void name##_bfloat16(int64_t n, const uint8_t *c, const float *s, const float *z, void *out)                      \
    {                                                                                                                                   \
        if (!s) decode_row(code, 1, n, c, NULL, NULL, out);                                                                             \
        else if (!z) decode_row(code, 1, n, c, s, NULL, out);                                                                           \
        else decode_row(code, 1, n, c, s, z, out);                                                                                      \
    }
DECODE(int8, CODE_INT8)
DECODE(e4m3, CODE_E4M3)
DECODE(e5m2, CODE_E5M2)
DECODE(int4, CODE_INT4)
DECODE(e2m1, CODE_E2M1)

static void (*const decoders[][2])(int64_t, const uint8_t *, const float *, const float *, void *) = {
    {int8_float32, int8_bfloat16}, {e4m3_float32, e4m3_bfloat16}, {e5m2_float32, e5m2_bfloat16},
    {int4_float32, int4_bfloat16}, {e2m1_float32, e2m1_bfloat16},
};

/* What each column of a row has of its group: value[...] of float or int8 as float. */
#define SPREAD(name, type)                                                                                                              \
    EVERY_ISA static void name(const struct coded *coded, const type *of_group, int64_t columns, float *to)                            \
    {                                                                                                                                   \
        if (coded->index) {                                                                                                             \
            for (int64_t column = 0; column < columns; column++)                                                                       \
                to[column] = (float)of_group[coded->index[column]];                                                                    \
            return;                                                                                                                     \
        }                                                                                                                               \
        for (int64_t group = 0, at = 0; at < coded->bytes; group++, at += coded->group_size) {                                         \
            float value = (float)of_group[group];                                                                                       \
            for (int64_t column = at; column < at + coded->group_size; column++)                                                       \
                to[column] = value;                                                                                                     \
        }                                                                                                                               \
        if (columns > coded->bytes)                                                                                                     \
            memcpy(to + coded->bytes, to, coded->bytes * sizeof *to);                                                                   \
    }
SPREAD(spread_scales, float)
SPREAD(spread_zeros, int8_t)

/* What one thread has at hand of the scales and zeros of a row. */
struct spread {
    float *scale, *zero;
    int64_t row;
};

static int64_t columns_of(const struct coded *coded) { return coded->bytes * (coded->code >= CODE_INT4 ? 2 : 1); }

static void one_row(const struct coded *coded, int64_t row, struct spread *spread, void *out)
{
    int64_t own = (coded->first_row + row + coded->row_cut) / coded->row_size, columns = columns_of(coded);
    if (coded->scales && own != spread->row) {
        spread->row = own;
        spread_scales(coded, coded->scales + own * coded->groups, columns, spread->scale);
        if (coded->zeros)
            spread_zeros(coded, coded->zeros + own * coded->groups, columns, spread->zero);
    }
    decoders[coded->code][coded->to_bf16](coded->bytes, coded->codes + row * coded->bytes, coded->scales ? spread->scale : NULL,
        coded->scales && coded->zeros ? spread->zero : NULL, out);
}

/* Fills `out`. 0, or -1 where there is no memory. */
int32_t decode(const struct coded *coded)
{
    int64_t columns = columns_of(coded), size = coded->to_bf16 ? 2 : 4;
    int32_t failed = 0;
#pragma omp parallel num_threads(coded->num_threads) if (coded->rows * columns > ALONE) reduction(| : failed)
    {
        float *memory = malloc(2 * columns * sizeof *memory);
        struct spread spread = {memory, memory + columns, -1};
        failed = !memory;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < coded->rows; row++)
            if (memory)
                one_row(coded, row, &spread, (char *)coded->out + row * columns * size);
        free(memory);
    }
    return -failed;
}

typedef float wide __attribute__((vector_size(64), aligned(4), may_alias));
#define SUMS 4 /* at once, so that no addition waits for the one before it */

/* Products of one row of weights with `count` rows of inputs. Every sum runs in the same order, however many there are. */
INLINE void dots(const int count, int64_t columns, const float *weights, const float *inputs, float *out)
{
    wide sums[2][SUMS];
    int64_t column = 0;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < SUMS; j++)
            sums[i][j] = (wide){0};
    for (; column + 16 * SUMS <= columns; column += 16 * SUMS)
        for (int j = 0; j < SUMS; j++) {
            wide own = *(const wide *)(weights + column + 16 * j);
            for (int i = 0; i < count; i++)
                sums[i][j] += own * *(const wide *)(inputs + i * columns + column + 16 * j);
        }
    for (int i = 0; i < count; i++) {
        wide all = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
        float sum = 0;
        for (int j = 0; j < 16; j++)
            sum += all[j];
        for (int64_t rest = column; rest < columns; rest++)
            sum += weights[rest] * inputs[i * columns + rest];
        out[i] = sum;
    }
}

EVERY_ISA static void products(int64_t count, int64_t columns, const float *weights, const float *inputs, float *out)
{
    for (; count >= 2; count -= 2, inputs += 2 * columns, out += 2)
        dots(2, columns, weights, inputs, out);
    if (count)
        dots(1, columns, weights, inputs, out);
}

/* out [rows, count] float32 = the numbers times inputs [count, columns] float32. 0, or -1 where there is no memory. */
int32_t multiply(const struct coded *coded, const float *inputs, int64_t count)
{
    int64_t columns = columns_of(coded);
    int32_t failed = 0;
#pragma omp parallel num_threads(coded->num_threads) if (coded->rows * columns > ALONE) reduction(| : failed)
    {
        float *memory = malloc(3 * columns * sizeof *memory), *numbers = memory + 2 * columns;
        struct spread spread = {memory, memory + columns, -1};
        failed = !memory;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < coded->rows; row++)
            if (memory) {
                one_row(coded, row, &spread, numbers);
                products(count, columns, numbers, inputs, (float *)coded->out + row * count);
            }
        free(memory);
    }
    return -failed;
}
