#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Called with the codes, or the float levels, of each quantizer of activations, with their number and their scale. */
#ifndef LOWBIT_WATCH
#define LOWBIT_WATCH(values, count, scale)
#endif

/* A weight: float values, or codes low + gap * digit, whose digits are a stream of bits, the lowest bit first. A code
   counts scale[output], or scale[0], and offset likewise; or it is looked up: table[row][digit]. */
typedef struct {
    const float *values;
    const uint8_t *digits;
    int bits, low, gap;
    const float *scale, *offset, *table;
    int per_output, base;
} lowbit_weight;

/* A convolution; a linear layer is one of 1 x 1 pixels. */
typedef struct {
    int channels, height, width, outputs, rows, columns, kernel_y, kernel_x;
    int stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups;
} lowbit_shape;

static int lowbit_digit(const lowbit_weight *w, size_t i) {
    const size_t bit = i * (size_t)w->bits;
    uint32_t word = w->digits[bit / 8];
    if (bit % 8 + (size_t)w->bits > 8) word |= (uint32_t)w->digits[bit / 8 + 1] << 8;
    if (bit % 8 + (size_t)w->bits > 16) word |= (uint32_t)w->digits[bit / 8 + 2] << 16;
    return (int)(word >> bit % 8 & ((1u << w->bits) - 1));
}

static float lowbit_value(const lowbit_weight *w, size_t i, int output) {
    if (w->values) return w->values[i];
    const int at = w->per_output ? output : 0, digit = lowbit_digit(w, i);
    if (w->table) return w->table[at * w->base + digit];
    const float value = (float)(w->low + w->gap * digit) * w->scale[at];
    return w->offset ? value + w->offset[at] : value;
}

/* The sums of one output channel, of codes or of values; `row` holds the weights of that channel. */
#define LOWBIT_SUMS(type, x, row) \
    for (int i = 0; i < g.rows; ++i) \
        for (int j = 0; j < g.columns; ++j) { \
            type sum = 0; \
            for (int c = 0; c < depth; ++c) \
                for (int k = 0; k < g.kernel_y; ++k) \
                    for (int l = 0; l < g.kernel_x; ++l) { \
                        const int y_ = i * g.stride_y + k * g.dilation_y - g.pad_y; \
                        const int x_ = j * g.stride_x + l * g.dilation_x - g.pad_x; \
                        if (y_ < 0 || y_ >= g.height || x_ < 0 || x_ >= g.width) continue; \
                        sum += (type)row[(c * g.kernel_y + k) * g.kernel_x + l] * \
                               (type)x[((first + c) * g.height + y_) * g.width + x_]; \
                    } \
            y[(o * g.rows + i) * g.columns + j] = (float)sum * factor + (bias ? bias[o] : 0); \
        }

/* Integer sums of codes, times both scales. */
static void lowbit_codes(const int16_t *x, float scale, const lowbit_weight *w, const float *bias, lowbit_shape g,
                         int16_t *row, float *y) {
    const int depth = g.channels / g.groups, size = depth * g.kernel_y * g.kernel_x;
    for (int o = 0; o < g.outputs; ++o) {
        const int first = o / (g.outputs / g.groups) * depth;
        const float factor = w->scale[w->per_output ? o : 0] * scale;
        for (int i = 0; i < size; ++i) row[i] = (int16_t)(w->low + w->gap * lowbit_digit(w, (size_t)o * size + i));
        LOWBIT_SUMS(int32_t, x, row)
    }
}

/* The same in float. */
static void lowbit_values(const float *x, const lowbit_weight *w, const float *bias, lowbit_shape g, float *row,
                          float *y) {
    const int depth = g.channels / g.groups, size = depth * g.kernel_y * g.kernel_x;
    for (int o = 0; o < g.outputs; ++o) {
        const int first = o / (g.outputs / g.groups) * depth;
        const float factor = 1;
        for (int i = 0; i < size; ++i) row[i] = lowbit_value(w, (size_t)o * size + i, o);
        LOWBIT_SUMS(float, x, row)
    }
}

/* round(x / step), ties to even, within the lowest and the highest code. */
static int16_t lowbit_quantize(float x, float step, int lowest, int highest) {
    const float code = nearbyintf(x / step);
    return (int16_t)(code > (float)lowest ? code < (float)highest ? code : (float)highest : (float)lowest);
}
