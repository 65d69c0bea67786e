// Fake quantization of dense tensors on a processor: functional.py defines what is computed, c_kernels.py compiles and calls this.
//
// A tensor is rows x positions x channels in the order of its memory, in float32 or bfloat16. Everything is rounded as often as
// the plain operations round it (compile with -ffp-contract=off), so results are theirs, bit for bit; only the gradient of the
// scale is a sum in another order, which does not depend on the number of threads.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))  // what is constant at a call is constant within

enum { BLOCK = 4096, WORTH_THREADS = 1 << 15 };  // elements: in one piece; in all, from which threads are worth their start
#define GOLDEN 0x9E3779B9u
enum { STE, EWGS, PEGE };  // as c_kernels.py numbers them

INLINE float load(const void *data, int64_t i, int is_half) {
    if (!is_half) return ((const float *)data)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void store(void *data, int64_t i, float value, int is_half) {
    if (!is_half) {
        ((float *)data)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // ties to even
    ((uint16_t *)data)[i] = value != value ? 0x7FC0 : (uint16_t)nearest;
}

// ``bits``: (number + key) * GOLDEN; see functional.py.
INLINE int is_replaced(uint32_t bits, uint32_t key, int32_t threshold) {
    bits = (bits ^ bits >> 16) * 0x21F0AAADu;
    bits = (bits ^ bits >> 15 ^ key) * 0xD35A2D97u;
    bits = bits ^ bits >> 15;
    return (int32_t)(bits >> 8) < threshold;
}

// --- forward ---------------------------------------------------------------------------------------------------

typedef struct {
    const void *x;
    void *y;
    const float *scale, *zero, *inverse;
    int64_t size, width, pieces, positions, channels;  // of a row: elements, elements in a piece, pieces; positions, channels
    int per_row;
    float q_min, q_max;
    uint32_t key, offset;  // the key times GOLDEN
    int32_t threshold;  // 2**24 * p
} Forward;

// Piece n of all rows' pieces. ``by_position``: of whole positions, whose channels follow each other in memory, and are
// ``positions`` apart in row-major order.
INLINE void forward_piece(const Forward *f, int64_t n, int is_half, int is_masked, int by_position, int multiplies) {
    const int64_t row = n / f->pieces, piece = n % f->pieces, begin = row * f->size + piece * f->width;
    const int64_t which = f->per_row ? row : 0;
    const float scale = f->scale[which], q_min = f->q_min, q_max = f->q_max;
    const float inverse = multiplies ? f->inverse[which] : 1.0f;
    const float add = f->zero ? f->zero[which] : -0.0f, subtract = f->zero ? add : 0.0f;  // which keep the sign of a zero
    const int32_t length = (int32_t)(piece == f->pieces - 1 ? (row + 1) * f->size - begin : f->width);
    const uint32_t positions = (uint32_t)f->positions, channels = (uint32_t)f->channels, key = f->key;
    const uint32_t first = (uint32_t)(by_position ? row * f->size + piece * f->width / channels : begin) + f->offset;
    const uint32_t start = first * GOLDEN + key, of_channel = positions * GOLDEN, of_position = GOLDEN - channels * of_channel;
    const float per_channel = f->width == channels ? 0.0f : 1.0f / channels;  // of one position all are in the first
    const int32_t threshold = f->threshold;
    const void *x = f->x;
    void *y = f->y;
#pragma omp simd
    for (int32_t i = 0; i < length; i++) {
        float value = load(x, begin + i, is_half);
        float code = rintf(multiplies ? value * inverse : value / scale) + add;
        code = code < q_min ? q_min : code;  // written so that NaN stays
        code = code > q_max ? q_max : code;
        float quantized = (code - subtract) * scale;
        uint32_t bits = start + (uint32_t)i * GOLDEN;
        if (by_position) {
            uint32_t position = (uint32_t)(int32_t)(((float)i + 0.5f) * per_channel);  // i / channels: exact for i < 2**13
            bits = start + (uint32_t)i * of_channel + position * of_position;
        }
        int replaced = !is_masked || is_replaced(bits, key, threshold);
        store(y, begin + i, replaced ? quantized : value, is_half);
    }
}

#define FORWARDS(name, is_masked, by_position, multiplies)                                                              \
    static void name##_float32(const Forward *f, int64_t n) { forward_piece(f, n, 0, is_masked, by_position, multiplies); } \
    static void name##_bfloat16(const Forward *f, int64_t n) { forward_piece(f, n, 1, is_masked, by_position, multiplies); }
FORWARDS(all, 0, 0, 0)
FORWARDS(some, 1, 0, 0)
FORWARDS(some_by_position, 1, 1, 0)
FORWARDS(all_multiplied, 0, 0, 1)
FORWARDS(some_multiplied, 1, 0, 1)
FORWARDS(some_multiplied_by_position, 1, 1, 1)

static void (*const FORWARD[2][3][2])(const Forward *, int64_t) = {
    {{all_float32, all_bfloat16}, {some_float32, some_bfloat16}, {some_by_position_float32, some_by_position_bfloat16}},
    {{all_multiplied_float32, all_multiplied_bfloat16},
     {some_multiplied_float32, some_multiplied_bfloat16},
     {some_multiplied_by_position_float32, some_multiplied_by_position_bfloat16}}};

// ``rate`` and ``key`` are null where all elements are replaced; the number of the first element follows the key if ``is_part``.
void pege_fx_forward(const void *x, void *y, const float *scale, const float *zero, const float *inverse, const float *rate,
                     const int32_t *key, int is_part, int64_t rows, int64_t positions, int64_t channels, int per_row, float q_min, float q_max,
                     int threads, int is_half) {
    const int by_position = rate && positions > 1 && channels > 1;
    const int64_t size = positions * channels, width = !by_position || channels < BLOCK ? BLOCK : channels;
    const int64_t whole = by_position ? width - width % channels : width, pieces = (size + whole - 1) / whole;
    Forward f = {x, y, scale, zero, inverse, size, whole, pieces, positions, channels, per_row, q_min, q_max, 0, 0, 0};
    if (rate) {
        f.key = (uint32_t)key[0] * GOLDEN;
        f.offset = is_part ? (uint32_t)key[1] : 0;
        f.threshold = (int32_t)ceilf(*rate * 16777216.0f);
    }
    void (*const compute)(const Forward *, int64_t) = FORWARD[inverse != NULL][rate ? 1 + by_position : 0][is_half];
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * size >= WORTH_THREADS) schedule(static)
    for (int64_t n = 0; n < rows * pieces; n++) compute(&f, n);
}

// --- backward --------------------------------------------------------------------------------------------------

typedef struct {
    const void *grad, *x, *y;
    void *grad_x;
    const float *scale, *zero, *inverse;
    int64_t size, pieces;
    float strength, q_min, q_max;
} Backward;

INLINE float only_if(int condition, float value) {  // as bits: compilers make slow code of a choice between floats
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= -(uint32_t)condition;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float nothing_if_nan(float term) { return only_if(term == term, term); }

// Writes dL/dx_c, and returns the sum over g * (y - r * x_c).
INLINE float backward_piece(const Backward *b, int64_t n, int is_half, int estimator, int multiplies) {
    const int64_t row = n / b->pieces, piece = n % b->pieces, begin = row * b->size + piece * BLOCK;
    const int64_t end = piece == b->pieces - 1 ? (row + 1) * b->size : begin + BLOCK;
    const float scale = b->scale[row], add = b->zero ? b->zero[row] : -0.0f, strength = b->strength;
    const float inverse = multiplies ? b->inverse[row] : 1.0f;
    const float q_min = b->q_min, q_max = b->q_max, span = fabsf(scale) * (q_max - q_min);
    const void *grad = b->grad, *x = b->x, *y = b->y;
    void *grad_x = b->grad_x;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; i++) {
        float g = load(grad, i, is_half), continuous = load(x, i, is_half), replaced = load(y, i, is_half);
        float code = rintf(multiplies ? continuous * inverse : continuous / scale) + add, error = continuous - replaced;
        int keep = ((code >= q_min) & (code <= q_max)) | (continuous == replaced);
        float result = only_if(keep, estimator == EWGS ? g + nothing_if_nan(strength * fabsf(g) * (error / span)) : g);
        store(grad_x, i, estimator == PEGE ? result + nothing_if_nan(strength * error) : result, is_half);
        sum += g * nothing_if_nan(replaced - only_if(keep, continuous));
    }
    return sum;
}

#define BACKWARDS(name, estimator, multiplies)                                                                        \
    static float name##_float32(const Backward *b, int64_t n) { return backward_piece(b, n, 0, estimator, multiplies); } \
    static float name##_bfloat16(const Backward *b, int64_t n) { return backward_piece(b, n, 1, estimator, multiplies); }
BACKWARDS(ste, STE, 0)
BACKWARDS(ewgs, EWGS, 0)
BACKWARDS(pege, PEGE, 0)
BACKWARDS(ste_multiplied, STE, 1)
BACKWARDS(ewgs_multiplied, EWGS, 1)
BACKWARDS(pege_multiplied, PEGE, 1)

static float (*const BACKWARD[2][3][2])(const Backward *, int64_t) = {
    {[STE] = {ste_float32, ste_bfloat16}, [EWGS] = {ewgs_float32, ewgs_bfloat16}, [PEGE] = {pege_float32, pege_bfloat16}},
    {[STE] = {ste_multiplied_float32, ste_multiplied_bfloat16},
     [EWGS] = {ewgs_multiplied_float32, ewgs_multiplied_bfloat16},
     [PEGE] = {pege_multiplied_float32, pege_multiplied_bfloat16}}};

// As many rows as scales, each of ``size`` elements. Returns 1 where there is no memory for the sums.
int pege_fx_backward(const void *grad, const void *x, const void *y, void *grad_x, float *grad_scale, const float *scale,
                     const float *zero, const float *inverse, const float *strength, int64_t rows, int64_t size, float q_min,
                     float q_max, int threads, int is_half, int estimator) {
    const int64_t pieces = (size + BLOCK - 1) / BLOCK;
    const Backward b = {grad, x, y, grad_x, scale, zero, inverse, size, pieces, *strength, q_min, q_max};
    float (*const compute)(const Backward *, int64_t) = BACKWARD[inverse != NULL][estimator][is_half];
    float *sums = malloc(sizeof(float) * rows * pieces);
    if (!sums) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * size >= WORTH_THREADS) schedule(static)
    for (int64_t n = 0; n < rows * pieces; n++) sums[n] = compute(&b, n);
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0;
        for (int64_t piece = 0; piece < pieces; piece++) sum += sums[row * pieces + piece];
        grad_scale[row] = (float)sum / scale[row];
    }
    free(sums);
    return 0;
}
