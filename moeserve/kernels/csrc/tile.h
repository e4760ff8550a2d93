/* A tile of rows times a panel, for one instruction set and one type of weights; included once for each.
 *
 * NAME(x)      x as it is called here
 * A            number type of rows
 * B            number type of weights
 * MR           rows at once; WIDTH output channels at once, all PANEL for one or two rows
 * STEP         input channels that lie side by side
 * LOAD(b, v)   STEP == 1: vector v of the output channels of one input channel
 * ONE_OF(b, v, channel)  STEP == 2: the same of one of two input channels; or with DOT(acc, a, b, v), both at once
 * MANY         with ONE_OF: so many rows are faster with a panel that is decoded before
 */
#define COLUMNS (WIDTH / VECTOR)
#define ALL_COLUMNS (PANEL / VECTOR)
#define RUN (64 / (int)sizeof(A))

static inline __attribute__((always_inline)) void NAME(some_rows)(
    const int count, const int columns, const A *a, const B *b, int64_t depth, float *c, struct ahead ahead)
{
    /* input channels to a run of lines */
    const int64_t channels = RUN_LINES * 64 / (PANEL * (int)sizeof(B));
    vec acc[MR][ALL_COLUMNS];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < columns; v++)
            acc[r][v] = (vec){0};
    for (int64_t k0 = 0; k0 < depth; k0 += RUN, a += TILE * RUN) {
        if (k0 % channels == 0)
            ask_for(ahead, k0 / channels);
#pragma GCC unroll 4
        for (int k = 0; k < RUN; k += STEP, b += STEP * PANEL) {
            /* those of the other channels, too: they are read next */
            for (size_t line = 0; line < STEP * PANEL * sizeof(B); line += 64)
                __builtin_prefetch((const char *)b + line + AHEAD);
#if STEP == 1
            vec weights[ALL_COLUMNS];
            for (int v = 0; v < columns; v++)
                weights[v] = LOAD(b, v);
            for (int r = 0; r < count; r++) {
                vec x = SPREAD(a[r * RUN + k]);
                for (int v = 0; v < columns; v++)
                    acc[r][v] += x * weights[v];
            }
#elif defined(DOT)
            for (int r = 0; r < count; r++)
                for (int v = 0; v < columns; v++)
                    acc[r][v] = DOT(acc[r][v], a + r * RUN + k, b, v);
#else
            /* One after the other: sums and both would not fit in 16 registers. */
            for (int channel = 0; channel < 2; channel++) {
                vec weights[ALL_COLUMNS];
                for (int v = 0; v < columns; v++)
                    weights[v] = ONE_OF(b, v, channel);
                for (int r = 0; r < count; r++) {
                    vec x = SPREAD(a[r * RUN + k + channel]);
                    for (int v = 0; v < columns; v++)
                        acc[r][v] += x * weights[v];
                }
            }
#endif
        }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < columns; v++)
            *(vec *)(c + r * PANEL + v * VECTOR) = acc[r][v];
}

#define ROWS(n) case n: NAME(some_rows)(n, COLUMNS, a, b, depth, c, ahead); break;

static void NAME(tile)(int count, const A *a, const B *b, int64_t depth, float *c, struct ahead ahead)
{
    for (; count >= MR; count -= MR, a += MR * RUN, c += MR * PANEL)
        NAME(some_rows)(MR, COLUMNS, a, b, depth, c, ahead);
    switch (count) {
    ROWS(1) ROWS(2)
#if MR > 3
    ROWS(3) ROWS(4) ROWS(5)
#endif
#if MR > 6
    ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11)
#endif
    }
}

static void NAME(multiply)(int count, const void *rows, const void *panel, int64_t depth, float *c, const void *next, void *decoded)
{
    const A *a = rows;
    int groups = (count + TILE - 1) / TILE;
#ifdef ONE_OF
    /* With narrow vectors, decoding a panel takes as long as multiplying it by a few rows: for many it is done once. */
    if (VECTOR < 16 && count >= MANY) {
        const B *b = panel;
        float *to = decoded;
        for (int64_t k = 0; k < depth; k += 2, b += 2 * PANEL)
            for (int channel = 0; channel < 2; channel++, to += PANEL)
                for (int v = 0; v < ALL_COLUMNS; v++)
                    *(vec *)(to + v * VECTOR) = ONE_OF(b, v, channel);
        ISA(multiply_float32)(count, rows, decoded, depth, c, NULL, NULL);
        return;
    }
#endif
    for (int group = 0; group < groups; group++, count -= TILE, a += TILE * depth, c += TILE * PANEL) {
        struct ahead ahead = share_of(next, group, groups);
        /* So few rows take all channels of a panel at once: their sums fit in registers, and its lines are read once, in their order. */
        switch (count * ALL_COLUMNS <= 8 ? count : 0) {
        case 1: NAME(some_rows)(1, ALL_COLUMNS, a, panel, depth, c, ahead); return;
        case 2: NAME(some_rows)(2, ALL_COLUMNS, a, panel, depth, c, ahead); return;
        }
        for (int first = 0; first < PANEL; first += WIDTH, ahead.lines = 0)
            NAME(tile)(count < TILE ? count : TILE, a, (const B *)panel + STEP * first, depth, c + first, ahead);
    }
}

#undef COLUMNS
#undef ALL_COLUMNS
#undef RUN
#undef ROWS
#undef NAME
#undef A
#undef B
#undef STEP
#undef LOAD
#undef ONE_OF
#undef MANY
#undef DOT
