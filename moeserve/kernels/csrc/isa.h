/* Everything of one instruction set but its matrix units; included once for each, between target pragmas.
 *
 * ISA(x)    x as it is called here
 * VECTOR    floats in a vector
 * HALVES(p) VECTOR float16 numbers at p, as floats
 * and what tile.h asks for: MR, WIDTH
 */
#define vec ISA(vec)
#define ivec ISA(ivec)
#define TILE 12
#define SPREAD(x) ((x) - (vec){0})

typedef float vec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef short ISA(svec) __attribute__((vector_size(2 * VECTOR), aligned(2), may_alias));

static inline vec ISA(of_bf16)(const bf16 *b, int v, int channel)
{
    ivec both = *(const ivec *)(b + 2 * v * VECTOR);
    return channel ? (vec)(both & (int)0xffff0000) : (vec)(both << 16);
}

static inline ivec ISA(two_bytes)(const void *b, int v)
{
    return __builtin_convertvector(*(const ISA(svec) *)((const uint8_t *)b + 2 * v * VECTOR), ivec);
}

static inline vec ISA(of_int8)(const int8_t *b, int v, int channel)
{
    ivec both = ISA(two_bytes)(b, v);
    return channel ? __builtin_convertvector(both >> 8, vec) : __builtin_convertvector(both << 24 >> 24, vec);
}

/* As small_float. */
static inline vec ISA(e4m3)(ivec byte)
{
    ivec magnitude = (byte & 0x7f) << 20, least = (ivec){0} + (121 << 23);
    ivec tiny = (ivec)((vec)(magnitude + least) - (vec)least), normal = magnitude + (120 << 23), is_tiny = magnitude < 1 << 23;
    return (vec)((tiny & is_tiny) | (normal & ~is_tiny) | (byte & 0x80) << 24);
}

static inline vec ISA(of_e4m3)(const uint8_t *b, int v, int channel)
{
    ivec both = ISA(two_bytes)(b, v);
    return channel ? ISA(e4m3)(both >> 8 & 0xff) : ISA(e4m3)(both & 0xff);
}

#define NAME(x) ISA(x##_float32)
#define A float
#define B float
#define STEP 1
#define LOAD(b, v) (*(const vec *)((b) + (v) * VECTOR))
#include "tile.h"

#define NAME(x) ISA(x##_float16)
#define A float
#define B f16
#define STEP 1
#define LOAD(b, v) HALVES((b) + (v) * VECTOR)
#include "tile.h"

#define NAME(x) ISA(x##_bfloat16)
#define A float
#define B bf16
#define STEP 2
#define ONE_OF(b, v, channel) ISA(of_bf16)(b, v, channel)
#define MANY 72
#include "tile.h"

#define NAME(x) ISA(x##_int8)
#define A float
#define B int8_t
#define STEP 2
#define ONE_OF(b, v, channel) ISA(of_int8)(b, v, channel)
#define MANY 48
#include "tile.h"

#define NAME(x) ISA(x##_e4m3)
#define A float
#define B uint8_t
#define STEP 2
#define ONE_OF(b, v, channel) ISA(of_e4m3)(b, v, channel)
#define MANY 24
#include "tile.h"

static inline vec ISA(select)(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }
static inline vec ISA(at_most)(vec x, float most) { return ISA(select)(x > most, SPREAD(most), x); }
static inline vec ISA(at_least)(vec x, float least) { return ISA(select)(x < least, SPREAD(least), x); }

/* e^x within 2 units in the last place, after Cephes (Moshier): 2^n e^r with |r| <= ln 2 / 2. NaN stays NaN. */
static inline vec ISA(exponential)(vec x)
{
    vec limited = ISA(at_least)(ISA(at_most)(x, 88.0f), -87.0f);
    vec turns = limited * 1.44269504f + 12582912.0f; /* rounds: 1.5 * 2^23 leaves no room for a fraction */
    ivec n = (ivec)turns - 0x4b400000;
    turns -= 12582912.0f;
    vec r = limited - turns * 0.693359375f;
    r -= turns * -2.12194440e-4f;
    vec y = SPREAD(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = (vec)((ivec)y + (n << 23));
    return ISA(select)(x == x, y, x);
}

/* 0 where e^-x is limited: a large x times it would not be near 0. */
static inline vec ISA(sigmoid)(vec x) { return ISA(select)(x < -88.0f, SPREAD(0.0f), 1.0f / (1.0f + ISA(exponential)(-x))); }

/* erf as a quotient of polynomials, as Eigen and XLA compute it. */
static inline vec ISA(erf)(vec x)
{
    x = ISA(at_least)(ISA(at_most)(x, 4.0f), -4.0f);
    vec s = x * x;
    vec p = SPREAD(-2.72614225801306e-10f);
    p = p * s + 2.77068142495902e-08f;
    p = p * s + -2.10102402082508e-06f;
    p = p * s + -5.69250639462346e-05f;
    p = p * s + -7.34990630326855e-04f;
    p = p * s + -2.95459980854025e-03f;
    p = p * s + -1.60960333262415e-02f;
    vec q = SPREAD(-1.45660718464996e-05f);
    q = q * s + -2.13374055278905e-04f;
    q = q * s + -1.68282697438203e-03f;
    q = q * s + -7.37332916720468e-03f;
    q = q * s + -1.42647390514189e-02f;
    return x * p / q;
}

static inline vec ISA(gelu)(vec x) { return 0.5f * x * (1.0f + ISA(erf)(x * 0.707106781f)); }

static inline vec ISA(silu)(vec x) { return x * ISA(sigmoid)(x); }

static inline vec ISA(within)(vec x, float limit) { return ISA(at_least)(ISA(at_most)(x, limit), -limit); }

static inline vec ISA(activated)(struct activation activation, vec gate, vec up)
{
    float limit = activation.limit;
    switch (activation.function) {
    case SWIGLU: return ISA(silu)(ISA(at_most)(gate, limit)) * ISA(within)(up, limit);
    case SWIGLU_POST: return ISA(at_most)(ISA(silu)(gate), limit) * ISA(within)(up, limit);
    case SWIGLUOAI:
        gate = ISA(at_most)(gate, limit);
        return (ISA(within)(up, limit) + 1.0f) * (gate * ISA(sigmoid)(1.702f * gate));
    case GEGLU: return ISA(gelu)(gate) * up;
    case GEGLU_TANH: return gate * ISA(sigmoid)(1.59576912f * (gate + 0.044715f * gate * gate * gate)) * up;
    case GELU: return ISA(gelu)(gate);
    case RELU: return ISA(at_least)(gate, 0.0f);
    case RELU2:
        gate = ISA(at_least)(gate, 0.0f);
        return gate * gate;
    }
    return gate;
}

static inline vec ISA(finished)(const float *sums, struct channels channels, int v)
{
    vec x = *(const vec *)(sums + v * VECTOR);
    if (channels.scale)
        x *= *(const vec *)(channels.scale + v * VECTOR);
    if (channels.bias)
        x += *(const vec *)(channels.bias + v * VECTOR);
    return x;
}

static void ISA(activate)(struct activation activation, struct sums sums, struct channels gate, struct channels up, void *at)
{
    for (int r = 0; r < sums.rows; r++)
        for (int v = 0; v < PANEL / VECTOR; v++) {
            vec x = ISA(finished)(sums.gate + r * PANEL, gate, v);
            vec y = sums.up ? ISA(finished)(sums.up + r * PANEL, up, v) : x;
            /* rows in float32: a panel is two runs of 16 numbers */
            int column = v * VECTOR;
            float *to = (float *)at + (column / 16 * TILE + r) * 16 + column % 16;
            *(vec *)to = ISA(activated)(activation, x, y);
        }
}

static void ISA(add)(struct sums sums, struct channels channels, int width, const int64_t *index, const float *weights, int64_t stride, float *out)
{
    for (int r = 0; r < sums.rows; r++) {
        float *to = out + index[r] * stride;
        if (width == PANEL) {
            for (int v = 0; v < PANEL / VECTOR; v++)
                *(vec *)(to + v * VECTOR) += weights[r] * ISA(finished)(sums.gate + r * PANEL, channels, v);
        } else {
            float all[PANEL];
            for (int v = 0; v < PANEL / VECTOR; v++)
                *(vec *)(all + v * VECTOR) = weights[r] * ISA(finished)(sums.gate + r * PANEL, channels, v);
            for (int column = 0; column < width; column++)
                to[column] += all[column];
        }
    }
}

#undef vec
#undef ivec
#undef TILE
#undef SPREAD
#undef ISA
#undef VECTOR
#undef HALVES
#undef MR
#undef WIDTH
