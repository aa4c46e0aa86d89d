#include "gradient.h"

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

  bool fits(const at::Tensor& like, at::MemoryFormat format) const {
    return buffer.sizes() == like.sizes() && buffer.dtype() == like.dtype() && buffer.is_contiguous(format) &&
        buffer.storage().use_count() == 1;
  }
};

std::mutex mutex;
std::unordered_map<c10::TensorImpl*, Kept> kept;

void forget_dead_weights() {
  for (auto it = kept.begin(); it != kept.end();) it = it->second.weight.expired() ? kept.erase(it) : std::next(it);
}

}  // namespace

KeepGradients::KeepGradients() { ++keeping; }
KeepGradients::~KeepGradients() { --keeping; }

at::Tensor zeros_for_gradient(const at::Tensor& weight, const Runs& rows, const Runs& columns, at::MemoryFormat format) {
  const bool whole = total(rows) == weight.size(0) && (columns.empty() || total(columns) == weight.size(1));
  if (whole) return at::empty_like(weight, format);
  if (keeping == 0 || !weight.is_cpu()) return at::zeros_like(weight, format);
  const std::lock_guard<std::mutex> lock(mutex);
  const at::Tensor owner = weight.is_view() ? at::Tensor(weight._base()) : weight;
  auto* key = owner.unsafeGetTensorImpl();
  auto found = kept.find(key);
  if (found != kept.end() && (found->second.weight.expired() || !found->second.fits(weight, format))) {
    kept.erase(found);
    found = kept.end();
  }
  if (found == kept.end()) {
    forget_dead_weights();
    const at::Tensor buffer = at::zeros_like(weight, format);
    kept.emplace(key, Kept{c10::weak_intrusive_ptr<c10::TensorImpl>(owner.getIntrusivePtr()), buffer, buffer._version(), rows, columns});
    return buffer.detach();
  }
  Kept& entry = found->second;
  if (entry.version != static_cast<int64_t>(entry.buffer._version()) || !same(entry.rows, rows) || !same(entry.columns, columns)) {
    entry.buffer.zero_();
    entry.version = entry.buffer._version();
    entry.rows = rows;
    entry.columns = columns;
  }
  return entry.buffer.detach();
}

}  // namespace esper
