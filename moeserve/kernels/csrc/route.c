/* Which experts a token goes to, and with which weights: what torch takes a dozen calls for, however few the tokens. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* The k largest of every row of scores [tokens, experts] without NaN, by descending score, then ascending expert: ids and values [tokens, k]. */
void select_top_k(int64_t tokens, int64_t experts, int64_t k, const float *scores, int64_t *ids, float *values)
{
    for (int64_t token = 0; token < tokens; token++, scores += experts, ids += k, values += k) {
        int64_t found = 0;
        for (int64_t expert = 0; expert < experts; expert++) {
            if (found == k && scores[expert] <= values[k - 1])
                continue;
            int64_t place = found < k ? found++ : k - 1;
            for (; place > 0 && values[place - 1] < scores[expert]; place--)
                values[place] = values[place - 1], ids[place] = ids[place - 1];
            values[place] = scores[expert], ids[place] = expert;
        }
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

/* What is asked of `route_top_k`, for one request. */
struct route {
    int64_t tokens, experts, k;
    const float *logits, *scores; /* [tokens, experts] */
    float eps;                    /* as for `normalize`; below zero: weights are scores */
    float factor;                 /* multiplies the weights */
    int64_t *ids;                 /* [tokens, k] */
    float *values, *weights;      /* [tokens, k]: scores of these experts */
    int64_t *requested;           /* [experts], of zeros */
    double balance, logsumexp_squared; /* what the losses are made of: see `find_losses` */
};

/* The sum over all experts of their share of the choices times their mean score, and the mean of the squares of the logsumexp of the logits. */
static void find_losses(struct route *all)
{
    double balance = 0, squares = 0;
    for (int64_t token = 0; token < all->tokens; token++) {
        const float *scores = all->scores + token * all->experts;
        for (int64_t expert = 0; expert < all->experts; expert++)
            balance += (double)all->requested[expert] * scores[expert];
        /* the largest score is the exponential of its logit, divided by that of the logsumexp */
        double logsumexp = all->logits[token * all->experts + all->ids[token * all->k]] - log(all->values[token * all->k]);
        squares += logsumexp * logsumexp;
    }
    all->balance = balance / ((double)all->tokens * all->tokens * all->k);
    all->logsumexp_squared = squares / all->tokens;
}

/* Experts, weights, counts and losses where there is room for every choice; scores are the softmax of logits, tokens and k at least 1.
 * 0, or -1 where a logit is NaN or Inf. */
int32_t route_top_k(struct route *all)
{
    int64_t choices = all->tokens * all->k;
    for (int64_t i = 0; i < all->tokens * all->experts; i++) {
        uint32_t bits;
        memcpy(&bits, all->logits + i, 4);
        if ((bits & 0x7f800000) == 0x7f800000)
            return -1;
    }
    select_top_k(all->tokens, all->experts, all->k, all->scores, all->ids, all->values);
    if (all->eps >= 0)
        normalize(all->values, all->tokens, all->k, all->eps, all->weights);
    else
        memcpy(all->weights, all->values, choices * sizeof *all->weights);
    for (int64_t choice = 0; choice < choices; choice++) {
        all->requested[all->ids[choice]]++;
        if (all->factor != 1)
            all->weights[choice] *= all->factor;
    }
    find_losses(all);
    return 0;
}
