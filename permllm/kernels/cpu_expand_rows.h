/* The loop that makes a packed weight dense, for one instruction set and size of word; see cpu_matvec.c for the macros. */

/* Expand rows first to last - 1 into y. It has no tokens; a guarded row never reads past the end of the values. */
TARGET INLINE void NAME(expand_rows)(const struct job *job, int64_t first, int64_t last, int is_guarded)
{
    const int64_t channels = job->in_channels, whole = channels - channels % STEP;
    const VALUE *const end = (const VALUE *)job->values + job->out_channels * job->row_values;
    VALUE copy[STEP];
    VECTOR words;
    for (int64_t row = first; row < last; row++) {
        const VALUE *values = (const VALUE *)job->values + row * job->row_values;
        const uint8_t *bits = job->bits + row * job->row_bytes;
        VALUE *dense = (VALUE *)job->y + row * channels;
        for (int64_t channel = 0; channel < whole; channel += STEP) {
            BITS kept;
            memcpy(&kept, bits + channel / 8, sizeof kept);
            words = NAME(expand)(is_guarded ? guard(values, end, copy, sizeof copy) : values, kept);
            memcpy(dense + channel, &words, sizeof words);
            values += __builtin_popcount(kept);
        }
        if (whole < channels) {
            BITS kept = 0;
            for (int64_t byte = whole / 8; byte < job->row_bytes; byte++)
                kept |= (BITS)bits[byte] << 8 * (byte - whole / 8);
            words = NAME(expand)(is_guarded ? guard(values, end, copy, sizeof copy) : values, kept);
            memcpy(dense + whole, &words, (channels - whole) * sizeof(VALUE));
        }
    }
}

TARGET static void NAME(dense)(const struct job *job, int64_t first, int64_t last, int64_t token, int wanted)
{
    int64_t safe = at_most(last, job->out_channels - guarded_rows(job, STEP));
    if (first < safe)
        NAME(expand_rows)(job, first, safe, 0);
    NAME(expand_rows)(job, first < safe ? safe : first, last, 1);
}

#undef VALUE
#undef VECTOR
