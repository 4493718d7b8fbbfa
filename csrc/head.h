// The LM head on a CPU with bfloat16 units: products of hidden states and head, with the softmax inside.
//
// Types shared by native.cpp (interface) and head.cpp (kernels). Operands are packed into these layouts, in pairs of
// bfloat16 (one 32-bit word each), padded with zeros; all are aligned to 64 bytes:
//
//     lanes       [panels][width / 2][32]         hidden states for the logits: a panel of 32 rows, one in each lane
//     rows        [strips][width / 32][14][16]    the weight for the logits: strips of 14 columns of the vocabulary
//     pairs       [parts][columns / 2][14]        the weight for the gradient of the hidden states, in parts of 14 of
//                                                 their elements; 64 bytes more behind it
//     grad_logits [strips][panels][14][16]        d logp / d logits up to a factor a row, for the gradient of the weight
//     elements    [width / 32][panels][16][32]    hidden states for the gradient of the weight
//
// (width rounded up to 32.) The gradient of the hidden states is float32 [panels][parts][14][32].
#pragma once

#include "rows.h"
#include "workers.h"

namespace rpo {

constexpr int64_t kStrip = 14, kPanel = 32, kPiece = 16;

// Rows of bfloat16 in memory, `stride` elements apart; with an index, these rows of them, else the first ones.
struct Matrix {
  const uint16_t* data;
  const int32_t* index;
  int64_t stride, rows, width;
};

// A tile of logits: packed operands, other inputs, and results.
struct HeadTile {
  const uint32_t* lanes;
  const uint32_t* rows;
  const uint32_t* pairs;   // null: no gradient of the hidden states
  const float* bias;       // [columns], or null
  const int32_t* labels;   // [rows]: the label's column in this tile; any number outside of it if it has none
  float* gradient;         // added to: sum over columns of grad_logits * weight; read only with `pairs`
  uint32_t* grad_logits;   // written, or null
  int64_t row_count, column_count, width;
  TokenTransform options;
  int32_t stream;          // whether `grad_logits` is written past the caches: it is read in backward only
};

// Sums for outputs beside the log-probability, over all columns but the label's; each [rows], all null without outputs.
struct OutputRows {
  double* sum_exp_z;   // sum of P (z - reference), in bits
  double* sum_z;       // sum of z, in bits
  double* sum_sq_exp;  // sum of P^2
  float *max_before_label, *max_after_label;  // largest logits, not transformed, before and after the label's column
  float* at_label;     // the label's logit, not transformed, as this product rounds it
};

// Running softmax of the rows over all columns but the label's, relative to 2^reference. The reference is an integer,
// so that moving it is exact, and is moved when a logit lies ten bits above it.
struct RunningRows {
  float* reference;    // [rows]; `grad_logits` of the tile is relative to what it is after the tile
  double* sum;         // [rows]
  const float* label;  // [rows]: the label's transformed logit in bits
  uint8_t* marks;      // [columns], or null: set to 1 where a probability may exceed `threshold`
  double* dropped;     // [rows], with marks (needs `grad_logits`): sum over the columns without a mark
  float threshold;
  OutputRows outputs;
};

// grad_logits = (factor + entropy_factor (z - reference + entropy_offset)) P for each row, 0 at its label.
struct FinishedRows {
  const float *reference, *factor;
  const float *entropy_factor, *entropy_offset;  // null: no gradient of the entropy
};

// grad_logits^T elements, and gain * hidden at the rows' labels; row i of it goes to row index[i] (null: i) of a matrix
// of the tile's width, dense.
struct WeightGradient {
  const uint32_t* elements;
  Matrix hidden;
  const float* gain;     // [rows]
  const int32_t* index;
  uint16_t* rounded;     // written, or null: then `exact` is written, or added to
  float* exact;
  int32_t add;
};

struct HeadKernels {
  void (*pack_hidden)(const Workers&, const Matrix&, const float* factor, uint32_t* lanes, uint32_t* elements);
  void (*pack_weight)(const Workers&, const Matrix&, uint32_t* rows, uint32_t* pairs);
  void (*forward)(const Workers&, const HeadTile&, const RunningRows&);
  void (*backward)(const Workers&, const HeadTile&, const FinishedRows&);
  void (*weight_gradient)(const Workers&, const HeadTile&, const WeightGradient&);
  // out[index[v]] += sum over rows of grad_logits[v] * factor
  void (*bias_gradient)(const Workers&, const HeadTile&, const float* factor, const int32_t* index, float* out);
};

}  // namespace rpo
