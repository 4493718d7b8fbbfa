// Checks the kernels against plain loops in double precision, without Python: for machines that are only emulated.
//
//     aarch64-linux-gnu-g++ -std=c++17 -O3 -DRPO_LEVEL=neon -c rows.cpp -o rows.o
//     aarch64-linux-gnu-g++ -std=c++17 -O3 -static -DRPO_HAVE_NEON check.cpp rows.o -o check && qemu-aarch64 ./check
//
// tests/test_native.py does more, and where Python runs it is the test.

#include <cstdio>
#include <random>
#include <sstream>
#include <string>

#include "native.cpp"

namespace {

uint16_t half_bits(float x) {
  const double size = std::abs(double(x));
  uint32_t low = 0, high = 0x7c00;  // values grow with their bits
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (float16_value(uint16_t(middle)) <= size ? low : high) = middle;
  }
  const double below = size - float16_value(uint16_t(low)), above = float16_value(uint16_t(high)) - size;
  const uint32_t nearest = below < above || (below == above && low % 2 == 0) ? low : high;
  return uint16_t(nearest | (std::signbit(x) ? 0x8000 : 0));
}

uint16_t bfloat_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void put(std::vector<char>& data, DType dtype, int64_t i, float x) {
  const uint16_t half = dtype == DType::kFloat16 ? half_bits(x) : bfloat_bits(x);
  if (dtype == DType::kFloat32)
    std::memcpy(&data[size_t(4 * i)], &x, 4);
  else
    std::memcpy(&data[size_t(2 * i)], &half, 2);
}

struct Worst {
  double logp = 0, sumexp = 0, entropy = 0, grad = 0;
};

// One batch of rows of `columns` columns with an instruction set; errors go into `worst`.
void check(const InstructionSet* isa, DType dtype, const TokenTransform& options, int64_t columns, Worst& worst) {
  constexpr int64_t kRows = 3;
  const double ulp = dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-9 : 0x1p-12;
  std::mt19937 random(unsigned(columns) + unsigned(dtype));
  std::normal_distribution<float> normal(0, 5);
  std::vector<char> x(size_t(kRows * columns * element_size(dtype))), out(x.size());
  std::vector<int64_t> labels(kRows);
  for (int64_t i = 0; i < kRows * columns; ++i) put(x, dtype, i, normal(random));
  for (int64_t& label : labels) label = int64_t(random() % uint64_t(columns));

  float fields[6][kRows], factors[kRows] = {1.0f, -0.5f, 2.0f};
  const Logits logits{x.data(), labels.data(), {kRows * columns, columns}, {kRows, 1}, 1, kRows, columns, 0, -100,
                      options,  dtype,         0};
  const Stats stats{fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
  const Grad grad{fields[0], fields[1], fields[2], factors, {kRows, 1}, out.data(), {kRows * columns, columns}, dtype,
                  {}};
  const Workers workers{nullptr, 2};
  rpo_row_stats(isa, &workers, &logits, 0, &stats);
  rpo_row_grad(isa, &workers, &logits, &grad);

  double squares = 0, errors = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    const char* row = &x[size_t(r * columns * element_size(dtype))];
    double max = -kInfinity, sumexp = 0, weighted = 0;
    for (int64_t i = 0; i < columns; ++i) max = std::max(max, transform(options, element(row, dtype, i)));
    for (int64_t i = 0; i < columns; ++i) {
      const double away = transform(options, element(row, dtype, i)) - max;
      sumexp += std::exp(away);
      weighted += std::exp(away) * away;
    }
    const double logp = transform(options, element(row, dtype, labels[size_t(r)])) - max - std::log(sumexp);
    const double shift = std::exp(max - double(fields[1][r]));
    worst.logp = std::max(worst.logp, std::abs(fields[0][r] - logp) - 0x1p-24 * std::abs(logp));
    worst.sumexp = std::max(worst.sumexp, std::abs(fields[2][r] / (sumexp * shift) - 1));
    const double entropy = std::log(fields[2][r]) - fields[4][r] / fields[2][r];
    worst.entropy = std::max(worst.entropy, std::abs(entropy - (std::log(sumexp) - weighted / sumexp)));
    for (int64_t i = 0; i < columns; ++i) {
      const double value = element(row, dtype, i), p = std::exp(transform(options, value) - max) / sumexp;
      const double unit = i == labels[size_t(r)] ? -std::expm1(logp) : -p;
      const double exact = unit * transform_slope(options, value) * factors[r];
      const double found = element(&out[size_t(r * columns * element_size(dtype))], dtype, i);
      squares += exact * exact;
      errors += (found - exact) * (found - exact);
    }
  }
  worst.grad = std::max(worst.grad, std::sqrt(errors / squares) / ulp);
}

}  // namespace

int main() {
  const TokenTransform transforms[] = {{1, 0, 1}, {0.3, 0, 0.7}, {1, 30, 1}};
  bool passed = true;
  std::istringstream sets(rpo_instruction_sets());
  for (std::string name; sets >> name;) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      Worst worst;
      for (const TokenTransform& options : transforms)
        for (const int64_t columns : {5, 8, 31, 64, 333, 9001, 70001})
          check(rpo_instruction_set(name.c_str()), dtype, options, columns, worst);
      // In nats beyond rounding the value; gradients in norm, in units of half the type's last place.
      const bool good = worst.logp < 2e-6 && worst.sumexp < 3e-6 && worst.entropy < 5e-6 && worst.grad < 17;
      std::printf("%-8s dtype %d: logp %.1e sumexp %.1e entropy %.1e gradient %.2f %s\n", name.c_str(),
                  int(dtype), worst.logp, worst.sumexp, worst.entropy, worst.grad, good ? "ok" : "WRONG");
      passed = passed && good;
    }
  }
  return passed ? 0 : 1;
}
