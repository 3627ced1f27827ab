/* The loop of cpu_matvec.c for one instruction set and type; see there for the macros. */

/* Compute `rows` x `tokens` outputs and store those of the first `wanted` tokens. What follows `tail` is constant where this is
   inlined, so that loops over it unroll and sums stay in registers. */
TARGET INLINE void NAME(block)(const struct job *job, int64_t row, int64_t token, int wanted, const VALUE *const *x, const VALUE (*tail)[STEP],
                               int rows, int tokens, int is_packed, int is_guarded)
{
    const int64_t channels = job->in_channels, whole = channels - channels % STEP;
    const VALUE *const end = (const VALUE *)job->values + job->out_channels * job->row_values;
    const VALUE *values[MAX_ROWS];
    const uint8_t *bits[MAX_ROWS];
    VALUE copy[STEP];
    VECTOR weight[MAX_ROWS];
    SUMS sums[MAX_ROWS][MAX_TOKENS];

    UNROLL for (int r = 0; r < rows; r++)
    {
        values[r] = (const VALUE *)job->values + (row + r) * job->row_values;
        bits[r] = is_packed ? job->bits + (row + r) * job->row_bytes : 0;
        UNROLL for (int t = 0; t < tokens; t++) sums[r][t] = (SUMS){0};
    }
    for (int64_t channel = 0; channel < whole; channel += STEP) {
        UNROLL for (int r = 0; r < rows; r++)
        {
            if (is_packed) {
                BITS kept;
                memcpy(&kept, bits[r] + channel / 8, sizeof kept);
                weight[r] = NAME(expand)(is_guarded ? guard(values[r], end, copy, sizeof copy) : values[r], kept);
                if (channel % (64 / sizeof(VALUE)) == 0) {
                    PREFETCH(values[r] + rows * job->row_values);
                    PREFETCH(bits[r] + channel / 8 + rows * job->row_bytes);
                }
                values[r] += __builtin_popcount(kept);
            } else {
                weight[r] = NAME(load)(values[r] + channel);
                if (channel % (64 / sizeof(VALUE)) == 0)
                    PREFETCH(values[r] + channel + rows * job->row_values);
            }
        }
        UNROLL for (int t = 0; t < tokens; t++)
        {
            VECTOR activations = NAME(load)(x[t] + channel);
            UNROLL for (int r = 0; r < rows; r++) sums[r][t] = NAME(dot)(sums[r][t], weight[r], activations);
        }
    }
    if (whole < channels)
        UNROLL for (int r = 0; r < rows; r++)
        {
            if (is_packed) {
                BITS kept = 0;
                for (int64_t byte = whole / 8; byte < job->row_bytes; byte++)
                    kept |= (BITS)bits[r][byte] << 8 * (byte - whole / 8);
                kept &= ((BITS)1 << (channels - whole)) - 1;
                weight[r] = NAME(expand)(is_guarded ? guard(values[r], end, copy, sizeof copy) : values[r], kept);
            } else
                weight[r] = NAME(load)(guard(values[r] + whole, values[r] + channels, copy, sizeof copy));
            UNROLL for (int t = 0; t < tokens; t++) sums[r][t] = NAME(dot)(sums[r][t], weight[r], NAME(load)(tail[t]));
        }
    UNROLL for (int r = 0; r < rows; r++)
    {
        float bias = job->bias ? JOIN(to_float, VALUE)(((const VALUE *)job->bias)[row + r]) : 0.0f;
        UNROLL for (int t = 0; t < tokens; t++)
        {
            if (t < wanted)
                ((VALUE *)job->y)[(token + t) * job->out_channels + row + r] = JOIN(from_float, VALUE)(NAME(total)(sums[r][t]) + bias);
        }
    }
}

/* Compute blocks of ROWS(tokens) rows from `row` up to `last`, and return the first row that is left over. */
TARGET INLINE int64_t NAME(blocks)(const struct job *job, int64_t row, int64_t last, int64_t token, int wanted, const VALUE *const *x,
                                   const VALUE (*tail)[STEP], int tokens)
{
    if (job->bits)
        for (; row + ROWS(tokens) <= last; row += ROWS(tokens))
            NAME(block)(job, row, token, wanted, x, tail, ROWS(tokens), tokens, 1, 0);
    else
        for (; row + ROWS(tokens) <= last; row += ROWS(tokens))
            NAME(block)(job, row, token, wanted, x, tail, ROWS(tokens), tokens, 0, 0);
    return row;
}

/* Compute rows first to last - 1 for up to MAX_TOKENS tokens: 3 run as 4, and 5 to 7 as 8, with the last one repeated. */
TARGET static void NAME(rows)(const struct job *job, int64_t first, int64_t last, int64_t token, int wanted)
{
    const VALUE *x[MAX_TOKENS];
    VALUE tail[MAX_TOKENS][STEP] = {{0}}; /* of x, what is left after whole steps, with zeros behind it */
    const int64_t left = job->in_channels % STEP;
    for (int t = 0; t < MAX_TOKENS; t++) {
        x[t] = (const VALUE *)job->x + (token + (t < wanted ? t : wanted - 1)) * job->in_channels;
        memcpy(tail[t], x[t] + job->in_channels - left, left * sizeof(VALUE));
    }
    int64_t row = first, safe = at_most(last, job->out_channels - (job->bits ? guarded_rows(job, STEP) : 0));
    if (wanted == 1)
        row = NAME(blocks)(job, row, safe, token, wanted, x, tail, 1);
    else if (wanted == 2)
        row = NAME(blocks)(job, row, safe, token, wanted, x, tail, 2);
    else if (wanted <= 4)
        row = NAME(blocks)(job, row, safe, token, wanted, x, tail, 4);
    else
        row = NAME(blocks)(job, row, safe, token, wanted, x, tail, 8);
    for (; row < last; row++)
        if (job->bits)
            NAME(block)(job, row, token, wanted, x, tail, 1, MAX_TOKENS, 1, 1);
        else
            NAME(block)(job, row, token, wanted, x, tail, 1, MAX_TOKENS, 0, 0);
}

#undef VALUE
