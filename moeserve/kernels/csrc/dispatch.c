/* Which pairs a host gets: what NumPy and torch take some twenty calls for, however few the tokens. */
#include <stdint.h>
#include <string.h>

/* N pairs of T tokens, and where P physical experts live on D hosts, numbered host by host. */
struct dispatch {
    int64_t num_tokens, num_pairs, num_physical, num_hosts;
    const int64_t *tokens;                  /* [N], ascending */
    const int64_t *physical;                /* [N] */
    const float *weights;                   /* [N] */
    const int64_t *host_of_physical;        /* [P], ascending */
    const int64_t *shared_host;             /* [T], -1 = none; NULL = there is no shared expert */
    const float *shared_weights;            /* [T] */
    /* what is found, host by host; there is room for N numbers, with a shared expert for N + T */
    int64_t *rows;                          /* the tokens of each host, each once */
    int32_t *row_index, *local_experts;     /* of each pair: which of the rows of its host it reads, and which of its experts */
    float *pair_weights;
    int64_t *row_ends, *pair_ends;          /* [D] */
    int64_t *space;                         /* P + 1 + N + T */
};

/* Pairs of one expert keep the order of their tokens; those of the shared expert come last on each host. */
void dispatch_pairs(const struct dispatch *all)
{
    int64_t *ends = all->space, *order = ends + all->num_physical + 1, *row_of = order + all->num_pairs;
    memset(ends, 0, 8 * (all->num_physical + 1));
    for (int64_t pair = 0; pair < all->num_pairs; pair++)
        ends[all->physical[pair] + 1]++;
    for (int64_t physical = 0; physical < all->num_physical; physical++)
        ends[physical + 1] += ends[physical];
    for (int64_t pair = 0; pair < all->num_pairs; pair++)
        order[ends[all->physical[pair]]++] = pair;
    int64_t rows = 0, pairs = 0, physical = 0, taken = 0;
    for (int64_t host = 0; host < all->num_hosts; host++) {
        int64_t first_physical = physical, first_row = rows, first_taken = taken;
        while (physical < all->num_physical && all->host_of_physical[physical] == host)
            taken = ends[physical++];
        if (taken > first_taken) {
            memset(row_of, 0, 8 * all->num_tokens);
            for (int64_t place = first_taken; place < taken; place++)
                row_of[all->tokens[order[place]]] = 1;
            for (int64_t token = 0; token < all->num_tokens; token++)
                if (row_of[token])
                    row_of[token] = rows - first_row, all->rows[rows++] = token;
            for (int64_t place = first_taken; place < taken; place++, pairs++) {
                int64_t pair = order[place];
                all->row_index[pairs] = (int32_t)row_of[all->tokens[pair]];
                all->local_experts[pairs] = (int32_t)(all->physical[pair] - first_physical);
                all->pair_weights[pairs] = all->weights[pair];
            }
            for (int64_t token = 0; all->shared_host && token < all->num_tokens; token++)
                if (all->shared_host[token] == host) {
                    all->row_index[pairs] = (int32_t)row_of[token];
                    all->local_experts[pairs] = (int32_t)(physical - first_physical);
                    all->pair_weights[pairs++] = all->shared_weights[token];
                }
        }
        all->row_ends[host] = rows, all->pair_ends[host] = pairs;
    }
}

/* A message: some rows of hidden states, and what is asked for them. */
struct message {
    int64_t num_rows, row_bytes, num_pairs;
    const char *hidden_states;
    const int64_t *rows; /* which of them; they are there */
    const int32_t *row_index, *local_experts;
    const float *weights;
    char *to_rows, *to_row_index, *to_local_experts, *to_weights;
};

void write_message(const struct message *message)
{
    for (int64_t row = 0; row < message->num_rows; row++)
        memcpy(message->to_rows + row * message->row_bytes, message->hidden_states + message->rows[row] * message->row_bytes, message->row_bytes);
    memcpy(message->to_row_index, message->row_index, 4 * message->num_pairs);
    memcpy(message->to_local_experts, message->local_experts, 4 * message->num_pairs);
    memcpy(message->to_weights, message->weights, 4 * message->num_pairs);
}

/* Choices [tokens, top_k] and where the first copy of each of `num_experts` experts is. */
struct choices {
    int64_t num_tokens, top_k, num_experts;
    const int64_t *topk_ids;
    const float *topk_weights;
    const uint8_t *kept;
    const int64_t *first_physical; /* [E] */
    int64_t *tokens, *physical;    /* room for a number for each choice, as in `weights` */
    float *weights;
};

/* The pairs of the kept choices of experts that live on hosts, in their order; how many. */
int64_t pairs_of(const struct choices *choices)
{
    int64_t count = 0;
    for (int64_t choice = 0; choice < choices->num_tokens * choices->top_k; choice++) {
        int64_t expert = choices->topk_ids[choice];
        if (!choices->kept[choice] || expert >= choices->num_experts)
            continue;
        choices->tokens[count] = choice / choices->top_k;
        choices->physical[count] = choices->first_physical[expert];
        choices->weights[count++] = choices->topk_weights[choice];
    }
    return count;
}
