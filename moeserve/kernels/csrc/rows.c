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
