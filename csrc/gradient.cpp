#include "gradient.h"

#include <torch/csrc/autograd/variable.h>

#include <mutex>
#include <unordered_map>

namespace esper {
namespace {

thread_local int keeping = 0;

bool same(const Runs& a, const Runs& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Run& p, const Run& q) {
    return p.start == q.start && p.length == q.length;
  });
}

struct Kept {
  c10::weak_intrusive_ptr<c10::TensorImpl> weight;
  at::Tensor buffer;
  int64_t version;
  Runs rows, columns;
  at::Tensor looked_up;  // the rows that may not be zero, where not all active ones

  bool fits(const at::Tensor& like, at::MemoryFormat format) const {
    return buffer.sizes() == like.sizes() && buffer.dtype() == like.dtype() && buffer.is_contiguous(format) &&
        buffer.storage().use_count() == 1;
  }

  bool known(const Runs& r, const Runs& c) const {
    return version == static_cast<int64_t>(buffer._version()) && same(rows, r) && same(columns, c);
  }

  void clear() {
    buffer.zero_();
    version = buffer._version();
  }

  // Below autograd, where this runs, an alias would count its versions alone.
  at::Tensor hand_out() const {
    const at::Tensor alias = buffer.detach();
    torch::autograd::impl::set_version_counter(alias, torch::autograd::impl::version_counter(buffer));
    return alias;
  }
};

std::mutex mutex;
std::unordered_map<c10::TensorImpl*, Kept> kept;

void forget_dead_weights() {
  for (auto it = kept.begin(); it != kept.end();) it = it->second.weight.expired() ? kept.erase(it) : std::next(it);
}

// The entry of a weight, made if there is none whose buffer can be handed out. Its buffer is zero but for `rows` x `columns`, and within
// those but for the rows `looked_up`, if that is defined.
Kept& claim(const at::Tensor& weight, const Runs& rows, const Runs& columns, at::MemoryFormat format) {
  const at::Tensor owner = weight.is_view() ? at::Tensor(weight._base()) : weight;
  auto* key = owner.unsafeGetTensorImpl();
  auto found = kept.find(key);
  if (found != kept.end() && (found->second.weight.expired() || !found->second.fits(weight, format))) {
    kept.erase(found);
    found = kept.end();
  }
  const auto none = [&] { return at::empty({0}, weight.options().dtype(at::kLong)); };
  if (found == kept.end()) {
    forget_dead_weights();
    const at::Tensor buffer = at::zeros_like(weight, format);
    const c10::weak_intrusive_ptr<c10::TensorImpl> reference(owner.getIntrusivePtr());
    found = kept.emplace(key, Kept{reference, buffer, static_cast<int64_t>(buffer._version()), rows, columns, none()}).first;
  }
  Kept& entry = found->second;
  if (!entry.known(rows, columns)) {
    entry.clear();
    entry.rows = rows;
    entry.columns = columns;
    entry.looked_up = none();
  }
  return entry;
}

}  // namespace

KeepGradients::KeepGradients() { ++keeping; }
KeepGradients::~KeepGradients() { --keeping; }

at::Tensor zeros_for_gradient(const at::Tensor& weight, const Runs& rows, const Runs& columns, at::MemoryFormat format) {
  const bool whole = total(rows) == weight.size(0) && (columns.empty() || total(columns) == weight.size(1));
  if (whole) return at::empty_like(weight, format);
  if (keeping == 0 || !weight.is_cpu()) return at::zeros_like(weight, format);
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& entry = claim(weight, rows, columns, format);
  entry.looked_up = at::Tensor();
  return entry.hand_out();
}

at::Tensor zeros_for_lookups(const at::Tensor& weight, const Runs& rows, const Runs& columns, const at::Tensor& looked_up) {
  if (keeping == 0 || !weight.is_cpu()) return at::zeros_like(weight);
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& entry = claim(weight, rows, columns, at::MemoryFormat::Contiguous);
  if (!entry.looked_up.defined()) {
    entry.clear();
  } else if (entry.looked_up.numel() > 0) {
    for (const Run& run : columns) entry.buffer.narrow(1, run.start, run.length).index_fill_(0, entry.looked_up, 0);
  }
  entry.version = entry.buffer._version();
  entry.looked_up = looked_up.numel() < weight.size(0) ? looked_up.clone() : at::Tensor();
  return entry.hand_out();
}

}  // namespace esper
