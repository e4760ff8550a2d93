/* The grouped pass for pairs as a message has them: one call, however few they are. */
#include "pass.h"
#include <pthread.h>
#include <stdlib.h>

/* N pairs, sorted by expert, of R rows. */
struct pairs {
    int64_t num_pairs, num_rows, num_experts;
    const void *hidden_states;    /* [R, H] in rows_type */
    const int32_t *row_index;     /* [N] */
    const int32_t *local_experts; /* [N] */
    const float *weights;         /* [N]: what answers are multiplied by */
    float *out;                   /* [R, H], overwritten */
    int32_t num_threads;
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&key, free); }

/* A buffer of so many bytes, aligned to 64, for this thread until its next call; kept, because fresh memory costs page faults. */
static char *kept(int64_t bytes)
{
    pthread_once(&once, make_key);
    int64_t *held = pthread_getspecific(key); /* its size comes first */
    if (!held || *held < bytes) {
        free(held);
        held = aligned_alloc(64, (bytes + 127) / 64 * 64);
        pthread_setspecific(key, held);
        if (!held)
            return NULL;
        *held = bytes;
    }
    return (char *)held + 64;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Counts the pairs of each expert; whether they ascend, and name experts that there are. */
static int counted(const struct pairs *pairs, int64_t *tokens_per_expert)
{
    memset(tokens_per_expert, 0, 8 * pairs->num_experts);
    int32_t expert = 0;
    for (int64_t pair = 0; pair < pairs->num_pairs; pair++) {
        if (pairs->local_experts[pair] < expert || pairs->local_experts[pair] >= pairs->num_experts)
            return 0;
        tokens_per_expert[expert = pairs->local_experts[pair]]++;
    }
    return 1;
}

/* 0, -1 when a pair names a row or -2 when it names an expert that is not there, -3 without memory; nothing is written then. */
int run_pairs(const struct bank *bank, const struct pairs *pairs)
{
    int64_t numbers = aligned(8 * (pairs->num_experts + pairs->num_pairs));
    int64_t *tokens_per_expert = (int64_t *)kept(numbers);
    if (!tokens_per_expert)
        return -3;
    if (!counted(pairs, tokens_per_expert))
        return -2;
    struct work work = {
        pairs->num_pairs, pairs->num_rows, pairs->hidden_states, NULL, tokens_per_expert, pairs->num_experts, NULL, pairs->weights, pairs->out, NULL,
        pairs->num_threads, 0};
    char *space = kept(numbers + scratch_bytes(bank, &work));
    if (!space)
        return -3;
    int64_t *row_index = (int64_t *)space + pairs->num_experts;
    counted(pairs, (int64_t *)space); /* it may be another place */
    for (int64_t pair = 0; pair < pairs->num_pairs; pair++)
        row_index[pair] = pairs->row_index[pair];
    work.tokens_per_expert = (int64_t *)space, work.row_index = row_index, work.scratch = space + numbers;
    return run_pass(bank, &work);
}
