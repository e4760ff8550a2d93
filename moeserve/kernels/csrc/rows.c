/* What is done with rows of numbers around the experts: one call each, however few they are. */
#include "kernels.h"

/* Whether none of `count` numbers is NaN or Inf: those have all bits of the exponent. */
int all_finite(const void *numbers, int64_t count, int32_t type)
{
    uint32_t exponent = type == FLOAT32 ? 0x7f800000 : type == BFLOAT16 ? 0x7f80 : 0x7c00;
    int found = 0;
    if (type == FLOAT32)
        for (int64_t i = 0; i < count; i++)
            found |= (((const uint32_t *)numbers)[i] & exponent) == exponent;
    else
        for (int64_t i = 0; i < count; i++)
            found |= (((const uint16_t *)numbers)[i] & exponent) == exponent;
    return !found;
}

/* A host's answer: partial [count, width], of these rows of the whole. */
struct answer {
    int64_t count;
    const int64_t *rows;
    const float *partial;
};

/* out [tokens, width] = the sum of `count` answers in their order, 0 where there is none. */
void add_answers(const struct answer *answers, int64_t count, int64_t tokens, int64_t width, float *out)
{
    memset(out, 0, 4 * tokens * width);
    for (const struct answer *answer = answers; answer < answers + count; answer++)
        for (int64_t row = 0; row < answer->count; row++) {
            float *to = out + answer->rows[row] * width;
            const float *from = answer->partial + row * width;
            for (int64_t i = 0; i < width; i++)
                to[i] += from[i];
        }
}

/* A sum in the order in which torch adds up what lies side by side: 8 sums of every 8th number, or, of fewer, 4 of every 4th. */
static float torch_sum(const float *numbers, int64_t count)
{
    int64_t lanes = count < 8 ? 1 : 8, vectors = count / lanes;
    float sums[4][8] = {{0}}, sum = 0;
    for (int64_t vector = 0; vector < vectors; vector++)
        for (int64_t lane = 0; lane < lanes; lane++)
            sums[vector < vectors / 4 * 4 ? vector % 4 : 0][lane] += numbers[vector * lanes + lane];
    for (int64_t i = vectors * lanes; i < count; i++)
        sum += numbers[i];
    for (int64_t lane = 0; lane < lanes; lane++)
        sum += ((sums[0][lane] + sums[1][lane]) + sums[2][lane]) + sums[3][lane];
    return sum;
}

/* out [tokens, k] = scores / (their sum + eps) */
void normalize(const float *scores, int64_t tokens, int64_t k, float eps, float *out)
{
    for (int64_t token = 0; token < tokens; token++, scores += k, out += k) {
        float sum = torch_sum(scores, k) + eps;
        for (int64_t i = 0; i < k; i++)
            out[i] = scores[i] / sum;
    }
}

/* The sum of counts * numbers; `products` has room for `count`. */
float weighted_sum(const int64_t *counts, const float *numbers, int64_t count, float *products)
{
    for (int64_t i = 0; i < count; i++)
        products[i] = (float)counts[i] * numbers[i];
    return torch_sum(products, count);
}
