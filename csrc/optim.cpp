// AdamW and SGD on the active part of many parameters at once, in place; dormant elements are neither read nor written.
//
// A parameter is seen as rows of `columns` elements. Its active part is a grid of cells, row bands x column bands, on each of which all
// elements have been updated equally often. A plan says where: an int64 vector
//     [columns, number of row bands, number of column bands, (start, stop, offset) per row band, (start, stop, offset) per column band]
// and the step count of a cell is counts[row offset + column offset]. What a formula takes from the count are two constants per cell.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define ESPER_WITH_AVX2 1
#endif

namespace esper {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kChunk = 32768;  // elements that one task updates
constexpr int64_t kGrain = 32768;  // elements that are worth a thread
constexpr int64_t kNarrow = 32;    // below this mean width, column bands are handled by arrays of constants
constexpr int64_t kAhead = 6;      // rows to prefetch ahead; tuned on 2048 x 2048 of which 512 columns are active

struct Band {
  int64_t start, stop, offset;
};

struct Constants {
  double first, second;
};

// Either one pair of constants for a whole stretch, or one pair per element.
template <typename T>
struct Shared {
  T first_, second_;
  T first(int64_t) const { return first_; }
  T second(int64_t) const { return second_; }
};
template <typename T>
struct Each {
  const T* __restrict first_;
  const T* __restrict second_;
  T first(int64_t i) const { return first_[i]; }
  T second(int64_t i) const { return second_[i]; }
};

// p = p (1 - lr wd) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps), in the order of torch's single-tensor loop.
struct AdamW {
  static constexpr int kTensors = 5;  // parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq or exp_avg_sq again

  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize;

  Constants at(int64_t step) const {
    const double t = static_cast<double>(step);
    return {lr / (1 - std::pow(beta1, t)), 1 / std::sqrt(1 - std::pow(beta2, t))};
  }

  template <typename T, typename C>
  __attribute__((always_inline)) inline void row(T* const* tensors, int64_t begin, int64_t length, const C& constants) const {
    T* __restrict p = tensors[0] + begin;
    const T* __restrict g = tensors[1] + begin;
    T* __restrict m = tensors[2] + begin;
    T* __restrict v = tensors[3] + begin;
    T* __restrict peak = tensors[4] + begin;
    const T decay = 1 - lr * weight_decay, near = 1 - beta1, far = beta1, keep = beta2, take = 1 - beta2, epsilon = eps;
    const T sign = maximize ? -1 : 1;
    const bool from_gradient = near >= T(0.5);
    if (amsgrad) {
      for (int64_t i = 0; i < length; ++i) {
        const T grad = sign * g[i];
        m[i] = from_gradient ? grad - (grad - m[i]) * far : m[i] + near * (grad - m[i]);
        v[i] = v[i] * keep + take * grad * grad;
        peak[i] = peak[i] > v[i] ? peak[i] : v[i];
        p[i] = p[i] * decay - constants.first(i) * m[i] / (std::sqrt(peak[i]) * constants.second(i) + epsilon);
      }
    } else {
      for (int64_t i = 0; i < length; ++i) {
        const T grad = sign * g[i];
        m[i] = from_gradient ? grad - (grad - m[i]) * far : m[i] + near * (grad - m[i]);
        v[i] = v[i] * keep + take * grad * grad;
        p[i] = p[i] * decay - constants.first(i) * m[i] / (std::sqrt(v[i]) * constants.second(i) + epsilon);
      }
    }
  }
};

// b = momentum b + (1 - dampening) g, and b = g at an element's first update.
struct SGD {
  static constexpr int kTensors = 3;  // parameter, gradient, momentum buffer or the parameter again

  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;

  Constants at(int64_t step) const { return step == 1 ? Constants{0, 1} : Constants{momentum, 1 - dampening}; }

  template <typename T, typename C>
  __attribute__((always_inline)) inline void row(T* const* tensors, int64_t begin, int64_t length, const C& constants) const {
    T* __restrict p = tensors[0] + begin;
    const T* __restrict g = tensors[1] + begin;
    T* __restrict b = tensors[2] + begin;
    const T rate = lr, decay = weight_decay, kept = momentum, sign = maximize ? -1 : 1;
    if (momentum == 0) {
      for (int64_t i = 0; i < length; ++i) p[i] -= rate * (sign * g[i] + decay * p[i]);
    } else if (nesterov) {
      for (int64_t i = 0; i < length; ++i) {
        const T grad = sign * g[i] + decay * p[i];
        b[i] = constants.first(i) * b[i] + constants.second(i) * grad;
        p[i] -= rate * (grad + kept * b[i]);
      }
    } else {
      for (int64_t i = 0; i < length; ++i) {
        b[i] = constants.first(i) * b[i] + constants.second(i) * (sign * g[i] + decay * p[i]);
        p[i] -= rate * b[i];
      }
    }
  }
};

template <typename T, typename C, typename Rule>
void stretch_default(const Rule& rule, T* const* tensors, int64_t begin, int64_t length, const C& constants) {
  rule.row(tensors, begin, length, constants);
}

#ifdef ESPER_WITH_AVX2
const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");

template <typename T, typename C, typename Rule>
__attribute__((target("avx2,fma"))) void stretch_avx2(
    const Rule& rule, T* const* tensors, int64_t begin, int64_t length, const C& constants) {
  rule.row(tensors, begin, length, constants);
}
#endif

template <typename T, typename C, typename Rule>
void stretch(const Rule& rule, T* const* tensors, int64_t begin, int64_t length, const C& constants) {
#ifdef ESPER_WITH_AVX2
  if (has_avx2) return stretch_avx2<T>(rule, tensors, begin, length, constants);
#endif
  stretch_default<T>(rule, tensors, begin, length, constants);
}

// One parameter: its tensors, its grid, and the constants of each cell.
template <typename T, typename Rule>
struct Work {
  T* tensors[Rule::kTensors];
  int64_t columns;
  std::vector<Band> rows, bands;
  std::vector<Constants> constants;

  bool narrow() const { return bands.size() > 1 && bands.back().stop - bands.front().start < kNarrow * int64_t(bands.size()); }
  const Constants& cell(size_t row, size_t band) const { return constants[row * bands.size() + band]; }
};

struct Task {  // rows x columns of one row band; all column bands in it
  int64_t work, row_band, row_begin, row_end, begin, end;
};

// Rows to come lie on other pages, where no hardware prefetcher looks ahead: fetch where they begin.
template <typename T, typename Rule>
void prefetch(const Work<T, Rule>& work, int64_t begin) {
  for (T* tensor : work.tensors) {
    __builtin_prefetch(tensor + begin);
    __builtin_prefetch(tensor + begin + 64 / sizeof(T));
  }
}

template <typename T, typename Rule>
void run_narrow(const Rule& rule, const Work<T, Rule>& work, const Task& task) {
  std::vector<T> first(task.end - task.begin), second(task.end - task.begin);
  std::vector<Band> spans;
  for (size_t b = 0; b < work.bands.size(); ++b) {
    const Band& band = work.bands[b];
    const Constants& c = work.cell(task.row_band, b);
    for (int64_t i = band.start - task.begin; i < band.stop - task.begin; ++i) {
      first[i] = static_cast<T>(c.first);
      second[i] = static_cast<T>(c.second);
    }
    if (!spans.empty() && spans.back().stop == band.start) {
      spans.back().stop = band.stop;
    } else {
      spans.push_back(band);
    }
  }
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    for (const Band& span : spans) {
      const Each<T> each{first.data() + span.start - task.begin, second.data() + span.start - task.begin};
      stretch<T>(rule, work.tensors, row * work.columns + span.start, span.stop - span.start, each);
    }
  }
}

template <typename T, typename Rule>
void run(const Rule& rule, const Work<T, Rule>& work, const Task& task) {
  if (work.narrow()) return run_narrow(rule, work, task);
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    for (size_t b = 0; b < work.bands.size(); ++b) {
      const Band& band = work.bands[b];
      const int64_t begin = std::max(band.start, task.begin), length = std::min(band.stop, task.end) - begin;
      if (length <= 0) continue;
      if (row + kAhead < task.row_end) prefetch(work, (row + kAhead) * work.columns + begin);
      const Constants& c = work.cell(task.row_band, b);
      const Shared<T> shared{static_cast<T>(c.first), static_cast<T>(c.second)};
      stretch<T>(rule, work.tensors, row * work.columns + begin, length, shared);
    }
  }
}

std::vector<Band> read_bands(const int64_t*& plan, int64_t count) {
  std::vector<Band> bands;
  bands.reserve(count);
  for (; count > 0; --count, plan += 3) bands.push_back({plan[0], plan[1], plan[2]});
  return bands;
}

// Raise the count of every active cell and note what the formula makes of it.
template <typename Rule>
std::vector<Constants> advance(const Rule& rule, const std::vector<Band>& rows, const std::vector<Band>& bands, int64_t* counts) {
  std::vector<Constants> constants;
  constants.reserve(rows.size() * bands.size());
  std::unordered_map<int64_t, Constants> known;
  int64_t last = -1;
  Constants current{};
  for (const Band& row : rows) {
    for (const Band& band : bands) {
      const int64_t step = ++counts[row.offset + band.offset];
      if (step != last) {
        current = known.try_emplace(step, rule.at(step)).first->second;
        last = step;
      }
      constants.push_back(current);
    }
  }
  return constants;
}

// Cut the grid into tasks: whole rows where they are short, pieces of one row where they are long.
template <typename T, typename Rule>
void add_tasks(const Work<T, Rule>& work, int64_t index, std::vector<Task>& tasks, std::vector<int64_t>& offsets) {
  const int64_t begin = work.bands.front().start, end = work.bands.back().stop;
  const int64_t width = work.narrow() ? end - begin : std::min(end - begin, kChunk);
  const int64_t height = std::max<int64_t>(1, kChunk / width);
  for (size_t r = 0; r < work.rows.size(); ++r) {
    for (int64_t row = work.rows[r].start; row < work.rows[r].stop; row += height) {
      const int64_t row_end = std::min(row + height, work.rows[r].stop);
      for (int64_t column = begin; column < end; column += width) {
        const int64_t stop = std::min(column + width, end);
        tasks.push_back({index, static_cast<int64_t>(r), row, row_end, column, stop});
        offsets.push_back(offsets.back() + (row_end - row) * (stop - column));
      }
    }
  }
}

template <typename Rule>
void update(const Rule& rule, const std::vector<TensorList>& operands, TensorList counts, TensorList plans) {
  if (plans.empty()) return;
  AT_DISPATCH_FLOATING_TYPES(operands[0][0].scalar_type(), "esper_elastic::optimizer_step", [&] {
    std::vector<Work<scalar_t, Rule>> works(plans.size());
    std::vector<Task> tasks;
    std::vector<int64_t> offsets{0};
    for (size_t i = 0; i < plans.size(); ++i) {
      auto& work = works[i];
      for (int k = 0; k < Rule::kTensors; ++k) {
        const Tensor& tensor = operands[k][i];
        TORCH_INTERNAL_ASSERT(tensor.scalar_type() == operands[0][0].scalar_type() && tensor.numel() == operands[0][i].numel());
        work.tensors[k] = const_cast<scalar_t*>(tensor.const_data_ptr<scalar_t>());
      }
      const int64_t* plan = plans[i].const_data_ptr<int64_t>();
      work.columns = plan[0];
      const int64_t num_rows = plan[1], num_bands = plan[2];
      plan += 3;
      work.rows = read_bands(plan, num_rows);
      work.bands = read_bands(plan, num_bands);
      work.constants = advance(rule, work.rows, work.bands, counts[i].mutable_data_ptr<int64_t>());
      add_tasks(work, i, tasks, offsets);
    }
    at::parallel_for(0, offsets.back(), kGrain, [&](int64_t begin, int64_t end) {
      auto next = std::lower_bound(offsets.begin(), offsets.end() - 1, begin);
      for (size_t t = next - offsets.begin(); t < tasks.size() && offsets[t] < end; ++t) run(rule, works[tasks[t].work], tasks[t]);
    });
  });
}

// The autograd engine must see that these were written.
void bump(TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

void adamw(
    TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList counts,
    TensorList plans, double lr, double beta1, double beta2, double weight_decay, double eps, bool maximize) {
  const bool amsgrad = !max_exp_avg_sqs.empty();
  const AdamW rule{lr, beta1, beta2, weight_decay, eps, amsgrad, maximize};
  update(rule, {params, grads, exp_avgs, exp_avg_sqs, amsgrad ? max_exp_avg_sqs : exp_avg_sqs}, counts, plans);
  for (TensorList written : {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts}) bump(written);
}

void sgd(
    TensorList params, TensorList grads, TensorList buffers, TensorList counts, TensorList plans, double lr, double momentum,
    double dampening, double weight_decay, bool nesterov, bool maximize) {
  const SGD rule{lr, momentum, dampening, weight_decay, nesterov, maximize};
  update(rule, {params, grads, momentum != 0 ? buffers : params}, counts, plans);
  for (TensorList written : {params, buffers, counts}) bump(written);
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("adamw_", adamw);
  m.impl("sgd_", sgd);
}

}  // namespace
}  // namespace esper
