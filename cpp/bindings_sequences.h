// Whose the tokens of a call to the runner are, as Python says it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace runner_input {

template <class T>
std::string text(const std::vector<T>& shape) {
  std::string out = "[";
  for (const T n : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + "]";
}

// One sequence's, or of each of several the next one.
struct Sequences {
  int one = 0;
  std::optional<std::vector<int>> several;

  explicit Sequences(nanobind::handle x) {
    if (nanobind::try_cast(x, one)) return;
    if (!nanobind::try_cast(x, several.emplace())) {
      throw nanobind::type_error("[ShadowRunner] sequence must be an int, or a sequence of them");
    }
  }

  // The shape of states [..., hidden_size].
  void check(const std::vector<size_t>& shape) const {
    if (!several) return;
    const size_t n = several->size();
    const std::vector<size_t> rows{n, shape.back()};
    const std::vector<size_t> decoded{n, 1, shape.back()};
    if (shape == rows || shape == decoded) return;
    throw std::invalid_argument("[ShadowRunner] hidden_states of " + std::to_string(n) + " sequences must be " +
                                text(rows) + " or " + text(decoded) + ", but is " + text(shape));
  }
};

}  // namespace runner_input
