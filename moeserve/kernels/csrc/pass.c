/* The grouped pass over the experts of a bank: gather rows, project up, activate, project down, weigh and add up in float32.
 *
 * A block is at most MAX_BLOCK rows of one expert, a group as many blocks as fit the scratch. Every sum runs over all input channels in
 * their order in one accumulator, and answers are added in the order of the experts, so an answer depends neither on the number of
 * threads nor on what else is computed: all that threads share is work.
 */
#include "pass.h"
#include <omp.h>

/* To be raised, here and in native.py, with every change of a struct or a function that Python knows: an editable install may have the
 * code of one version and the kernels of another. */
int32_t interface_version(void) { return 3; }

struct block {
    int64_t expert, first; /* pair */
    int64_t at;            /* row of the scratch */
    int rows;
};

static int64_t padded(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t bytes_of(int type) { return type == FLOAT32 ? 4 : type >= INT8 ? 1 : 2; }

/* Rows of a block: their numbers and a panel share the second-level cache. */
static int rows_of_block(const struct kernel *kernel, int64_t width)
{
    int64_t rows = (1 << 20) / (width * kernel->row_bytes) / (2 * kernel->tile) * (2 * kernel->tile);
    return (int)(rows < 2 * kernel->tile ? 2 * kernel->tile : least(rows, MAX_BLOCK / (2 * kernel->tile) * (2 * kernel->tile)));
}

static float rounded(float value, int type)
{
    return type == BFLOAT16 ? from_bf16(to_bf16(value)) : value;
}

static float number(const void *row, int64_t k, int type)
{
    return type == FLOAT32 ? ((const float *)row)[k] : type == BFLOAT16 ? from_bf16(((const bf16 *)row)[k]) : from_f16(((const f16 *)row)[k]);
}

/* One row to its place in a tile; the numbers beyond the hidden size are zero. */
static void gather_row(const struct kernel *kernel, const struct bank *bank, const struct work *work, int64_t pair, char *tile, int row)
{
    int64_t run = 64 / kernel->row_bytes, size = bank->hidden_size;
    const char *from = (const char *)work->hidden_states + work->row_index[pair] * size * bytes_of(bank->rows_type);
    float scale = work->input_weights ? work->input_weights[pair] : 1;
    int is_copy = scale == 1 && kernel->row_bytes == bytes_of(bank->rows_type) && bank->rows_type != FLOAT16;
    for (int64_t k = 0; k < padded(size); k += run, tile += 64 * kernel->tile) {
        char *to = tile + 64 * row;
        int64_t there = k < size ? least(run, size - k) : 0;
        if (there < run)
            memset(to, 0, 64);
        if (is_copy)
            memcpy(to, from + k * kernel->row_bytes, there * kernel->row_bytes);
        else
            for (int64_t i = 0; i < there; i++) {
                float value = number(from, k + i, bank->rows_type);
                if (scale != 1)
                    value = rounded(value * scale, bank->rows_type);
                if (kernel->row_bytes == 4)
                    ((float *)to)[i] = value;
                else
                    ((bf16 *)to)[i] = to_bf16(value);
            }
    }
}

struct pass {
    const struct bank *bank;
    const struct work *work;
    const struct kernel *kernel;
    char *gathered, *hidden, *decoded; /* scratch: rows, what is between the projections, room for a decoded panel for each thread */
    int64_t hidden_width, inner_width; /* padded; that of the widest busy expert */
    int64_t capacity;                  /* rows in the scratch */
    int num_threads;
};

static struct channels of_panel(const float *scale, const float *bias, int64_t panel)
{
    return (struct channels){scale ? scale + panel * PANEL : NULL, bias ? bias + panel * PANEL : NULL};
}

/* Panels first .. last of the first projection for one block. */
static void project_up(const struct pass *pass, const struct block *block, int64_t first, int64_t last, void *decoded)
{
    const struct bank *bank = pass->bank;
    const struct kernel *kernel = pass->kernel;
    int64_t parts = bank->is_gated ? 2 : 1, depth = pass->hidden_width, tile = kernel->tile;
    const float *scale = bank->up_scale[block->expert], *bias = bank->up_bias[block->expert];
    int64_t inner = padded(bank->intermediate_size[block->expert]);
    const char *rows = pass->gathered + block->at * depth * kernel->row_bytes;
    char *hidden = pass->hidden + block->at * pass->inner_width * kernel->row_bytes;
    float sums[2][MAX_BLOCK * PANEL];
    for (int64_t panel = first; panel < last; panel++) {
        const char *weights = (const char *)bank->up[block->expert] + panel * parts * depth * PANEL * bytes_of(bank->type);
        for (int64_t part = 0; part < parts; part++, weights += depth * PANEL * bytes_of(bank->type))
            kernel->multiply[bank->type](
                block->rows, rows, weights, depth, sums[part], weights + depth * PANEL * bytes_of(bank->type), decoded);
        struct channels gate = of_panel(scale, bias, panel * parts), up = of_panel(scale, bias, panel * parts + 1);
        for (int64_t row = 0; row < block->rows; row += tile) {
            struct sums some = {(int)least(tile, block->rows - row), sums[0] + row * PANEL, parts == 2 ? sums[1] + row * PANEL : NULL};
            char *at = hidden + (row * inner + panel * PANEL * tile) * kernel->row_bytes;
            kernel->activate(bank->activation, some, gate, up, at);
        }
    }
}

/* Panels first .. last of the second projection for one block. */
static void project_down(const struct pass *pass, const struct block *block, int64_t first, int64_t last, void *decoded)
{
    const struct bank *bank = pass->bank;
    const struct kernel *kernel = pass->kernel;
    int64_t depth = padded(bank->intermediate_size[block->expert]), size = bank->hidden_size;
    const int64_t *index = pass->work->row_index + block->first;
    const float *weights = pass->work->weights + block->first;
    const char *rows = pass->hidden + block->at * pass->inner_width * kernel->row_bytes;
    float sums[MAX_BLOCK * PANEL];
    for (int64_t panel = first; panel < last; panel++) {
        const char *matrix = (const char *)bank->down[block->expert] + panel * depth * PANEL * bytes_of(bank->type);
        kernel->multiply[bank->type](block->rows, rows, matrix, depth, sums, matrix + depth * PANEL * bytes_of(bank->type), decoded);
        struct sums all = {block->rows, sums, NULL};
        struct channels channels = of_panel(bank->down_scale[block->expert], bank->down_bias[block->expert], panel);
        kernel->add(all, channels, (int)least(PANEL, size - panel * PANEL), index, weights, size, pass->work->out + panel * PANEL);
    }
}

/* The panels of thread `number` of `count`. */
static int64_t share(int64_t panels, int number, int count) { return panels * number / count; }

/* All threads take part; each adds up output channels of its own, so the order of the sums is that of the blocks. */
static void run_group(const struct pass *pass, const struct block *blocks, int count, char *decoded)
{
    int64_t tile = pass->kernel->tile;
    int number = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp for schedule(static)
    for (int i = 0; i < count; i++)
        for (int row = 0; row < blocks[i].rows; row++) {
            int64_t at = blocks[i].at + row / tile * tile;
            char *to = pass->gathered + at * pass->hidden_width * pass->kernel->row_bytes;
            gather_row(pass->kernel, pass->bank, pass->work, blocks[i].first + row, to, (int)(row % tile));
        }
#pragma omp for schedule(dynamic)
    for (int item = 0; item < count * threads; item++) {
        const struct block *block = blocks + item / threads;
        int64_t panels = padded(pass->bank->intermediate_size[block->expert]) / PANEL;
        project_up(pass, block, share(panels, item % threads, threads), share(panels, item % threads + 1, threads), decoded);
    }
    int64_t panels = pass->hidden_width / PANEL;
    for (int i = 0; i < count; i++)
        project_down(pass, blocks + i, share(panels, number, threads), share(panels, number + 1, threads), decoded);
}

/* Of a decoded panel of either projection, of one thread. */
static int64_t decoded_bytes(const struct bank *bank, int64_t width, int64_t inner)
{
    int is_decoded = bank->type >= INT8 || (bank->type == BFLOAT16 && bank->kernel->row_bytes == 4);
    return is_decoded ? (width > inner ? width : inner) * PANEL * bank->kernel->row_bytes : 0;
}

static void run_blocks(const struct pass *pass, const struct block *blocks, int64_t count)
{
#pragma omp parallel num_threads(pass->num_threads)
    {
        char *decoded = pass->decoded + omp_get_thread_num() * decoded_bytes(pass->bank, pass->hidden_width, pass->inner_width);
        pass->kernel->begin();
#pragma omp for schedule(static)
        for (int64_t row = pass->work->adds ? pass->work->num_rows : 0; row < pass->work->num_rows; row++)
            memset(pass->work->out + row * pass->bank->hidden_size, 0, 4 * pass->bank->hidden_size);
        for (int64_t first = 0, last; first < count; first = last) {
            for (last = first + 1; last < count && blocks[last].at;)
                last++;
            run_group(pass, blocks + first, (int)(last - first), decoded);
        }
        pass->kernel->end();
    }
}

/* Cuts the pairs of every expert into blocks; a block at row 0 of the scratch begins a group. */
static int64_t cut(const struct pass *pass, struct block *blocks)
{
    const struct work *work = pass->work;
    int64_t count = 0, first = 0, at = 0, tile = pass->kernel->tile;
    int most = rows_of_block(pass->kernel, pass->hidden_width);
    for (int64_t expert = 0; expert < work->num_experts; expert++)
        for (int64_t left = work->tokens_per_expert[expert]; left > 0;) {
            int rows = (int)least(left, most);
            int64_t room = (rows + tile - 1) / tile * tile;
            if (at + room > pass->capacity)
                at = 0;
            blocks[count++] = (struct block){expert, first, at, rows};
            at += room, first += rows, left -= rows;
        }
    return count;
}

/* Below this many bytes of weights, or as many multiplications, waking other threads takes longer than they save. */
#define ALONE (1 << 19)

static int threads_worth(const struct bank *bank, const struct work *work)
{
    int64_t numbers = 0;
    for (int64_t expert = 0; expert < work->num_experts; expert++)
        if (work->tokens_per_expert[expert])
            numbers += (bank->is_gated ? 3 : 2) * bank->hidden_size * bank->intermediate_size[expert] * (1 + work->tokens_per_expert[expert] / 16);
    return numbers * bytes_of(bank->type) < ALONE ? 1 : work->num_threads;
}

static int64_t widest(const struct bank *bank, const struct work *work)
{
    int64_t width = 0;
    for (int64_t expert = 0; expert < work->num_experts; expert++)
        if (work->tokens_per_expert[expert] && padded(bank->intermediate_size[expert]) > width)
            width = padded(bank->intermediate_size[expert]);
    return width;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Rows of scratch: all, rounded up to tiles, or as many as stay in the cache, but no less than a block. */
static int64_t capacity(const struct kernel *kernel, const struct work *work, int64_t width)
{
    int64_t needed = 0, enough = (8 << 20) / (width * kernel->row_bytes);
    for (int64_t expert = 0; expert < work->num_experts; expert++)
        needed += (work->tokens_per_expert[expert] + kernel->tile - 1) / kernel->tile * kernel->tile;
    return least(needed, enough < MAX_BLOCK ? MAX_BLOCK : enough);
}

static int64_t max_blocks(const struct kernel *kernel, const struct work *work, int64_t width)
{
    int64_t rows = rows_of_block(kernel, width), count = 0;
    for (int64_t expert = 0; expert < work->num_experts; expert++)
        count += (work->tokens_per_expert[expert] + rows - 1) / rows;
    return count;
}

/* Bytes of scratch that `run_pass` needs for this work. */
int64_t scratch_bytes(const struct bank *bank, const struct work *work)
{
    const struct kernel *kernel = bank->kernel;
    int64_t width = padded(bank->hidden_size), inner = widest(bank, work);
    int64_t rows = capacity(kernel, work, width) * (width + inner) * kernel->row_bytes;
    int64_t decoded = work->num_threads * decoded_bytes(bank, width, inner);
    return aligned(rows) + decoded + max_blocks(kernel, work, width) * (int64_t)sizeof(struct block);
}

/* 0, or -1 when a pair names a row that is not there: nothing is read or written then. */
int run_pass(const struct bank *bank, const struct work *work)
{
    const struct kernel *kernel = bank->kernel;
    for (int64_t pair = 0; pair < work->num_pairs; pair++)
        if (work->row_index[pair] < 0 || work->row_index[pair] >= work->num_rows)
            return -1;
    struct pass pass = {.bank = bank, .work = work, .kernel = kernel, .gathered = work->scratch};
    pass.hidden_width = padded(bank->hidden_size);
    pass.inner_width = widest(bank, work);
    pass.capacity = capacity(kernel, work, pass.hidden_width);
    pass.num_threads = threads_worth(bank, work);
    pass.hidden = pass.gathered + pass.capacity * pass.hidden_width * kernel->row_bytes;
    pass.decoded = pass.gathered + aligned(pass.capacity * (pass.hidden_width + pass.inner_width) * kernel->row_bytes);
    int64_t decoded = work->num_threads * decoded_bytes(bank, pass.hidden_width, pass.inner_width);
    struct block *blocks = (struct block *)(pass.decoded + decoded);
    run_blocks(&pass, blocks, cut(&pass, blocks));
    return 0;
}

/* Bytes of scratch that `run_linear` needs. */
int64_t linear_scratch_bytes(int64_t inputs, int32_t num_threads) { return num_threads * padded(inputs) * MAX_BLOCK * 4; }

/* out [count, outputs] = rows [count, inputs] times a matrix in panels, plus bias in panels or NULL; all float32. */
void run_linear(
    const struct kernel *kernel, const float *rows, int64_t count, int64_t inputs, const float *panels, const float *bias, int64_t outputs,
    float *out, void *scratch, int32_t num_threads)
{
    int64_t depth = padded(inputs);
    int block = (int)least(rows_of_block(kernel, depth), (count + num_threads - 1) / num_threads);
    struct bank bank = {.rows_type = FLOAT32, .hidden_size = inputs};
    memset(out, 0, count * outputs * 4);
#pragma omp parallel for num_threads(count > block ? num_threads : 1) schedule(dynamic)
    for (int64_t first = 0; first < count; first += block) {
        float sums[MAX_BLOCK * PANEL], ones[MAX_BLOCK];
        int64_t index[MAX_BLOCK];
        int many = (int)least(block, count - first);
        char *gathered = (char *)scratch + omp_get_thread_num() * depth * MAX_BLOCK * 4;
        for (int row = 0; row < many; row++) {
            index[row] = first + row, ones[row] = 1;
            struct work work = {.hidden_states = rows, .row_index = index};
            gather_row(kernel, &bank, &work, row, gathered + row / kernel->tile * kernel->tile * depth * 4, row % kernel->tile);
        }
        for (int64_t panel = 0; panel * PANEL < outputs; panel++) {
            kernel->multiply[FLOAT32](many, gathered, panels + panel * depth * PANEL, depth, sums, NULL, NULL);
            struct sums all = {many, sums, NULL};
            int width = (int)least(PANEL, outputs - panel * PANEL);
            kernel->add(all, of_panel(NULL, bias, panel), width, index, ones, outputs, out + panel * PANEL);
        }
    }
}
