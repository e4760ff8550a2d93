/* What is asked of the grouped pass. */
#pragma once
#include "kernels.h"

/* What is the same for every pass. Arrays have one entry for each expert. */
struct bank {
    const struct kernel *kernel;
    int32_t type, rows_type, is_gated;
    struct activation activation;
    int64_t hidden_size;
    const int64_t *intermediate_size;
    const void *const *up, *const *down;                  /* panels; up: those of gate and up in turn */
    const float *const *up_scale, *const *down_scale;     /* padded as the panels; entries may be NULL */
    const float *const *up_bias, *const *down_bias;
};

/* N pairs, sorted by expert, of R rows. */
struct work {
    int64_t num_pairs, num_rows;
    const void *hidden_states;  /* [R, H] in rows_type */
    const int64_t *row_index;   /* [N] */
    const int64_t *tokens_per_expert; /* [E] */
    int64_t num_experts;
    const float *input_weights; /* [N], or NULL: what rows are multiplied by */
    const float *weights;       /* [N]: what answers are multiplied by */
    float *out;                 /* [R, H], overwritten, or added to */
    void *scratch; /* `scratch_bytes` of it, aligned to 64 */
    int32_t num_threads;
    int32_t adds; /* whether to what is in `out`, in the order of the experts */
};

/* Bytes of scratch that `run_pass` needs for this work. */
int64_t scratch_bytes(const struct bank *bank, const struct work *work);
/* 0, or -1 when a pair names a row that is not there: nothing is read or written then. */
int run_pass(const struct bank *bank, const struct work *work);
