/* y[t][o] = bias[o] + sum over j of x[t][j] * weight[o][j], for a few tokens t and a packed or a dense weight.

A packed weight is the kept values of every row in the order of their channels, and a bit per weight, the lowest bit of a
byte first. Few tokens make the product wait for memory, so the kernel reads each value and each bit once, and puts the
values into their places in registers: a step takes STEP bits of a row, spreads as many values as bits are set over a vector,
and moves on by that count. So it needs no pattern, only a row's values where the row starts.

cpu_matvec_rows.h is that loop, written once. It is included per instruction set and type, after

    SET, VALUE      the names of both, which end the names of the functions below
    TARGET          the attribute that allows the instructions
    STEP, BITS      channels per step, and an unsigned integer of so many bits
    VECTOR, SUMS    STEP values, and float32 sums of their products
    ROWS(tokens)    rows at once for 1, 2, 4 and 8 tokens: as many sums as registers can hold

and the functions load (STEP values), expand (values over the set bits; may read STEP of them), dot (sums + w * x) and total.

cpu_expand_rows.h stores what a step spreads instead: it makes the weight dense for products with many tokens. It only moves
words, so VALUE is an unsigned integer of a weight's size, and it needs SET, VALUE, TARGET, STEP, BITS, VECTOR and expand. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (__GNUC__ >= 10 || __clang_major__ >= 10)
#define IS_X86 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define PASTE(a, b) a##_##b
#define JOIN(a, b) PASTE(a, b)
#define NAME(part) JOIN(part, JOIN(SET, VALUE))

#define PREFETCH(address) __builtin_prefetch(address, 0, 2) /* of the next block, to the second cache: almost twice as fast */

#define MAX_TOKENS 8
#define MAX_ROWS 4
#define PART_BYTES (64 * 1024)   /* of weight at least that a thread starts for */
#define CHUNK_BYTES (128 * 1024) /* of weight that stay in the cache while further tokens pass over it */
#define PARTS_PER_THREAD 4       /* a thread that was held up leaves parts to the others */

typedef uint16_t bfloat16, word16;
typedef uint32_t word32;

INLINE float to_float_bfloat16(bfloat16 value)
{
    uint32_t word = (uint32_t)value << 16;
    float result;
    memcpy(&result, &word, sizeof result);
    return result;
}

INLINE bfloat16 from_float_bfloat16(float value) /* to the nearest, ties to even */
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (bfloat16)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE float to_float_float(float value) { return value; }
INLINE float from_float_float(float value) { return value; }

struct job {
    const void *x, *values;
    const uint8_t *bits; /* NULL: the weight is dense */
    const void *bias;    /* NULL: none */
    void *y;
    int64_t tokens, out_channels, in_channels;
    int64_t row_values, row_bytes; /* per row: how many values, and bytes of bits */
    int64_t part_rows, chunk_rows; /* of a part that one thread computes, and of a chunk of it */
    int64_t next_row;              /* where the next part starts */
    void (*rows)(const struct job *, int64_t first, int64_t last, int64_t token, int wanted);
};

INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

/* Return how many of the last rows could read past the end of the values, by a step or, should the bits be wrong, by a row. */
INLINE int64_t guarded_rows(const struct job *job, int step) { return (job->in_channels + step) / job->row_values + 1; }

/* Return where `bytes` can be read: at `values`, or, where fewer are left before `end`, in `copy` with zeros behind them. */
INLINE const void *guard(const void *values, const void *end, void *copy, int64_t bytes)
{
    int64_t left = (const char *)end - (const char *)values;
    if (left >= bytes)
        return values;
    memset(copy, 0, bytes);
    if (left > 0)
        memcpy(copy, values, left);
    return copy;
}

/* Which of a byte's channels takes which value: the number of set bits below its own, or ABSENT. */
#define ABSENT 0x80
static uint8_t places[256][8];
static uint8_t places_of_bytes[256][16]; /* the same for the bytes of a bfloat16 */

__attribute__((constructor)) static void fill_places(void)
{
    for (int bits = 0; bits < 256; bits++)
        for (int channel = 0, place = 0; channel < 8; channel++) {
            int is_kept = bits >> channel & 1;
            places[bits][channel] = is_kept ? place : ABSENT;
            places_of_bytes[bits][2 * channel] = is_kept ? 2 * place : ABSENT;
            places_of_bytes[bits][2 * channel + 1] = is_kept ? 2 * place + 1 : ABSENT;
            place += is_kept;
        }
}

/* ---- any processor: the compiler's own vectors ---- */

typedef float float8 __attribute__((vector_size(32)));
typedef int32_t int8 __attribute__((vector_size(32)));

INLINE float8 load_portable_float(const float *p)
{
    float8 result;
    memcpy(&result, p, sizeof result);
    return result;
}

INLINE float8 load_portable_bfloat16(const bfloat16 *p)
{
    int8 words = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    return (float8)(words << 16);
}

INLINE float8 keep(float8 values, int bits) /* zeros elsewhere, without a branch that would be mispredicted */
{
    int8 channels = {1, 2, 4, 8, 16, 32, 64, 128};
    return (float8)((int8)values & ((channels & bits) != 0));
}

INLINE float8 expand_portable_float(const float *p, uint8_t bits)
{
    const uint8_t *i = places[bits];
    return keep((float8){p[i[0] & 7], p[i[1] & 7], p[i[2] & 7], p[i[3] & 7], p[i[4] & 7], p[i[5] & 7], p[i[6] & 7], p[i[7] & 7]}, bits);
}

INLINE float8 expand_portable_bfloat16(const bfloat16 *p, uint8_t bits)
{
    const uint8_t *i = places[bits];
    int8 words = {p[i[0] & 7], p[i[1] & 7], p[i[2] & 7], p[i[3] & 7], p[i[4] & 7], p[i[5] & 7], p[i[6] & 7], p[i[7] & 7]};
    return keep((float8)(words << 16), bits);
}

INLINE float8 dot_portable_float(float8 sums, float8 w, float8 x) { return sums + w * x; }
INLINE float total_portable_float(float8 s) { return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7])); }
#define dot_portable_bfloat16 dot_portable_float
#define total_portable_bfloat16 total_portable_float

typedef word16 words16 __attribute__((vector_size(16)));

INLINE int8 expand_portable_word32(const word32 *p, uint8_t bits)
{
    const uint8_t *i = places[bits];
    int8 words = {p[i[0] & 7], p[i[1] & 7], p[i[2] & 7], p[i[3] & 7], p[i[4] & 7], p[i[5] & 7], p[i[6] & 7], p[i[7] & 7]};
    return (int8)keep((float8)words, bits);
}

INLINE words16 expand_portable_word16(const word16 *p, uint8_t bits)
{
    const uint8_t *i = places[bits];
    words16 channels = {1, 2, 4, 8, 16, 32, 64, 128};
    words16 words = {p[i[0] & 7], p[i[1] & 7], p[i[2] & 7], p[i[3] & 7], p[i[4] & 7], p[i[5] & 7], p[i[6] & 7], p[i[7] & 7]};
    return words & (words16)((channels & bits) != 0);
}

#define SET portable
#define TARGET
#define STEP 8
#define BITS uint8_t
#define VECTOR float8
#define SUMS float8
#define ROWS(tokens) ((tokens) <= 2 ? 2 : 1)
#define VALUE float
#include "cpu_matvec_rows.h"
#define VALUE bfloat16
#include "cpu_matvec_rows.h"
#undef VECTOR
#define VALUE word32
#define VECTOR int8
#include "cpu_expand_rows.h"
#define VALUE word16
#define VECTOR words16
#include "cpu_expand_rows.h"
#undef SET
#undef TARGET
#undef STEP
#undef BITS
#undef SUMS
#undef ROWS

#if IS_X86

/* ---- AVX2: places from a table ---- */

#define SET avx2
#define TARGET __attribute__((target("avx2,fma,popcnt")))
#define STEP 8
#define BITS uint8_t
#define VECTOR __m256
#define SUMS __m256
#define ROWS(tokens) ((tokens) <= 2 ? 4 : (tokens) <= 4 ? 2 : 1)

TARGET INLINE __m256 widen_avx2(__m128i values) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16)); }
TARGET INLINE __m256 load_avx2_float(const float *p) { return _mm256_loadu_ps(p); }
TARGET INLINE __m256 load_avx2_bfloat16(const bfloat16 *p) { return widen_avx2(_mm_loadu_si128((const __m128i *)p)); }

TARGET INLINE __m256 expand_avx2_float(const float *p, uint8_t bits)
{
    __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)places[bits])); /* ABSENT is negative */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), place), _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}

TARGET INLINE __m256i expand_avx2_word32(const word32 *p, uint8_t bits) { return _mm256_castps_si256(expand_avx2_float((const float *)p, bits)); }

TARGET INLINE __m128i expand_avx2_word16(const word16 *p, uint8_t bits)
{
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p), _mm_loadu_si128((const __m128i *)places_of_bytes[bits]));
}

TARGET INLINE __m256 expand_avx2_bfloat16(const bfloat16 *p, uint8_t bits) { return widen_avx2(expand_avx2_word16(p, bits)); }

TARGET INLINE __m256 dot_avx2_float(__m256 sums, __m256 w, __m256 x) { return _mm256_fmadd_ps(w, x, sums); }
#define dot_avx2_bfloat16 dot_avx2_float

TARGET INLINE float total_avx2_float(__m256 sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#define total_avx2_bfloat16 total_avx2_float

#define VALUE float
#include "cpu_matvec_rows.h"
#define VALUE bfloat16
#include "cpu_matvec_rows.h"
#undef VECTOR
#define VALUE word32
#define VECTOR __m256i
#include "cpu_expand_rows.h"
#define VALUE word16
#define VECTOR __m128i
#include "cpu_expand_rows.h"
#undef SET
#undef TARGET
#undef STEP
#undef BITS
#undef SUMS
#undef ROWS

/* ---- AVX-512 ---- */

#define SET avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,popcnt")))
#define STEP 16
#define BITS uint16_t
#define VECTOR __m512
#define SUMS __m512
#define ROWS(tokens) ((tokens) <= 4 ? 4 : 2)

TARGET INLINE __m512 load_avx512_float(const float *p) { return _mm512_loadu_ps(p); }

TARGET INLINE __m512 load_avx512_bfloat16(const bfloat16 *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

TARGET INLINE __m512 expand_avx512_float(const float *p, uint16_t bits) { return _mm512_maskz_expand_ps(bits, load_avx512_float(p)); }
TARGET INLINE __m512 expand_avx512_bfloat16(const bfloat16 *p, uint16_t bits) { return _mm512_maskz_expand_ps(bits, load_avx512_bfloat16(p)); }
TARGET INLINE __m512 dot_avx512_float(__m512 sums, __m512 w, __m512 x) { return _mm512_fmadd_ps(w, x, sums); }
TARGET INLINE float total_avx512_float(__m512 sums) { return _mm512_reduce_add_ps(sums); }
TARGET INLINE __m512i expand_avx512_word32(const word32 *p, uint16_t bits) { return _mm512_maskz_expand_epi32(bits, _mm512_loadu_si512(p)); }
#define dot_avx512_bfloat16 dot_avx512_float
#define total_avx512_bfloat16 total_avx512_float

#define VALUE float
#include "cpu_matvec_rows.h"
#define VALUE bfloat16
#include "cpu_matvec_rows.h"
#undef VECTOR
#define VALUE word32
#define VECTOR __m512i
#include "cpu_expand_rows.h"
#undef SET
#undef TARGET
#undef STEP
#undef BITS

/* ---- AVX-512 that expands 16-bit words ---- */

#define SET avx512_vbmi2
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")))
#define STEP 32
#define BITS uint32_t

TARGET INLINE __m512i expand_avx512_vbmi2_word16(const word16 *p, uint32_t bits)
{
    __m512i words = _mm512_loadu_si512(p);
    __asm__("" : "+v"(words)); /* expanding from a register is faster than from memory, which compilers prefer */
    return _mm512_maskz_expand_epi16(bits, words);
}

#define VALUE word16
#define VECTOR __m512i
#include "cpu_expand_rows.h"
#undef SET
#undef TARGET

/* ---- AVX-512 with products of bfloat16; they take denormal numbers for zero ---- */

#define SET avx512_bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")))
#define VECTOR __m512i

TARGET INLINE __m512i load_avx512_bf16_bfloat16(const bfloat16 *p) { return _mm512_loadu_si512(p); }
#define expand_avx512_bf16_bfloat16 expand_avx512_vbmi2_word16
TARGET INLINE __m512 dot_avx512_bf16_bfloat16(__m512 sums, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x); }
TARGET INLINE float total_avx512_bf16_bfloat16(__m512 sums) { return _mm512_reduce_add_ps(sums); }

#define VALUE bfloat16
#include "cpu_matvec_rows.h"

#endif

/* ---- the choice at run time, and the threads ---- */

enum work { MULTIPLY_FLOAT, MULTIPLY_BFLOAT16, EXPAND_WORD32, EXPAND_WORD16, WORKS };

static const struct {
    const char *name;
    void (*rows[WORKS])(const struct job *, int64_t, int64_t, int64_t, int); /* NULL: not for this work */
} variants[] = {
    /* the fastest first */
#if IS_X86
    {"avx512_bf16", {0, rows_avx512_bf16_bfloat16, 0, 0}},
    {"avx512_vbmi2", {0, 0, 0, dense_avx512_vbmi2_word16}},
    {"avx512", {rows_avx512_float, rows_avx512_bfloat16, dense_avx512_word32, 0}},
    {"avx2", {rows_avx2_float, rows_avx2_bfloat16, dense_avx2_word32, dense_avx2_word16}},
#endif
    {"portable", {rows_portable_float, rows_portable_bfloat16, dense_portable_word32, dense_portable_word16}},
};
#define VARIANTS (int)(sizeof variants / sizeof *variants)

static int is_supported(const char *name)
{
#if IS_X86
    __builtin_cpu_init();
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    int has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "avx512_bf16"))
        return has_avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(name, "avx512_vbmi2"))
        return has_avx512 && __builtin_cpu_supports("avx512vbmi2");
    if (!strcmp(name, "avx512"))
        return has_avx512;
    if (!strcmp(name, "avx2"))
        return has_avx2;
#endif
    return !strcmp(name, "portable");
}

/* Return the name of the n-th variant, the fastest first, that does a work on this processor; NULL after the last. */
const char *variant_name(int work, int n)
{
    for (int i = 0; i < VARIANTS; i++)
        if (variants[i].rows[work] && is_supported(variants[i].name) && n-- == 0)
            return variants[i].name;
    return 0;
}

static int64_t whole_blocks(int64_t rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS; }

static void compute_parts(void *argument)
{
    struct job *job = argument;
    for (;;) {
        int64_t first = __atomic_fetch_add(&job->next_row, job->part_rows, __ATOMIC_RELAXED);
        int64_t last = at_most(first + job->part_rows, job->out_channels);
        if (first >= last)
            return;
        for (int64_t row = first; row < last; row += job->chunk_rows)
            for (int64_t token = 0; token < job->tokens; token += MAX_TOKENS)
                job->rows(job, row, at_most(row + job->chunk_rows, last), token, at_most(job->tokens - token, MAX_TOKENS));
    }
}

typedef void parallel_function(void (*)(void *), void *, unsigned, unsigned);

/* Divide the rows, of which each takes `bytes` of memory, among the threads. Return -1 where the variant does not do the work. */
static int run(struct job *job, const char *variant, int work, int64_t bytes, parallel_function *parallel, int threads)
{
    for (int i = 0; i < VARIANTS; i++)
        if (!strcmp(variants[i].name, variant))
            job->rows = variants[i].rows[work];
    if (!job->rows)
        return -1;
    int64_t smallest = PART_BYTES / bytes + 1, shared = job->out_channels / (threads * PARTS_PER_THREAD) + 1;
    job->part_rows = whole_blocks(smallest > shared ? smallest : shared);
    job->chunk_rows = job->tokens > MAX_TOKENS ? whole_blocks(CHUNK_BYTES / bytes + 1) : job->part_rows;
    /* One thread or all of them: at any other number the runtime ends threads, which it then has to start again for torch. */
    if (parallel && threads > 1 && job->part_rows < job->out_channels)
        parallel(compute_parts, job, threads, 0);
    else
        compute_parts(job);
    return 0;
}

/* Multiply. `parallel` is GOMP_parallel of the OpenMP runtime that the process has loaded, or NULL; bits and bias may be NULL.
   No size may be 0. Return 0, or -1 where the variant is unknown or not for this work. */
int matvec(const char *variant, int work, parallel_function *parallel, int threads, const void *x, const void *values, const uint8_t *bits,
           const void *bias, void *y, int64_t tokens, int64_t out_channels, int64_t in_channels, int64_t row_values)
{
    struct job job = {x, values, bits, bias, y, tokens, out_channels, in_channels, row_values, (in_channels + 7) / 8, 0, 0, 0, 0};
    int64_t bytes = row_values * (work == MULTIPLY_FLOAT ? 4 : 2) + (bits ? job.row_bytes : 0);
    return run(&job, variant, work, bytes, parallel, threads);
}

/* Make a packed weight dense. As for `matvec`; bits may not be NULL. */
int expand(const char *variant, int work, parallel_function *parallel, int threads, const void *values, const uint8_t *bits, void *dense,
           int64_t out_channels, int64_t in_channels, int64_t row_values)
{
    struct job job = {0, values, bits, 0, dense, 1, out_channels, in_channels, row_values, (in_channels + 7) / 8, 0, 0, 0, 0};
    int64_t bytes = (row_values + in_channels) * (work == EXPAND_WORD32 ? 4 : 2) + job.row_bytes;
    return run(&job, variant, work, bytes, parallel, threads);
}
