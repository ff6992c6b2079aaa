#include "mlx_od_moe/training_ops.h"

#include <mlx/backend/cpu/encoder.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "mlx_od_moe/kernels/select.h"

namespace mlx_od_moe {
namespace {

namespace mx = mlx::core;

size_t size_of(int n) { return static_cast<size_t>(n); }

struct Sizes {
  int batch, tokens, lookahead, window, key, state;
  bool bf16;  // products

  int memory() const { return 2 * key + state; }
  size_t rows() const { return size_of(window + tokens); }
};

// What attention works in; a thread keeps it.
struct Scratch {
  float* floats;
  uint16_t* packed;  // on a cache line, as the floats are

  explicit Scratch(const Sizes& sizes) {
    constexpr size_t kLine = 64;
    const auto lines = [](size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; };
    const size_t first = lines(kernels::attention_scratch(sizes.window, sizes.key) * sizeof(float));
    const size_t packed_bytes = kernels::attention_packed(sizes.window, sizes.key, sizes.tokens) * sizeof(uint16_t);
    thread_local std::vector<std::byte> own;
    size_t room = first + (sizes.bf16 ? packed_bytes : 0) + kLine;
    if (own.size() < room) own.resize(room);
    void* begin = own.data();
    std::align(kLine, room - kLine, begin, room);
    floats = static_cast<float*>(begin);
    packed = reinterpret_cast<uint16_t*>(static_cast<std::byte*>(begin) + first);
  }
};

// Raw pointers to a read's inputs; MLX keeps the arrays alive until the task ran.
struct Memories {
  Sizes sizes;
  const float* query;
  const float* bias;
  const int32_t* sequence;
  std::vector<const float*> memories;  // by distance

  size_t query_at(int b, int d) const {
    return (size_of(b) * size_of(sizes.tokens) * size_of(sizes.lookahead) + size_of(d)) * size_of(sizes.key);
  }
  size_t bias_at(int d) const { return size_of(d) * size_of(sizes.window + 1); }
  size_t memory_at(int b) const { return size_of(b) * sizes.rows() * size_of(sizes.memory()); }

  kernels::WindowAttention attention(int b, int d, const Scratch& scratch) const {
    const float* memory = memories[size_of(d)] + memory_at(b);
    return {sizes.window,
            sizes.key,
            sizes.tokens,
            query + query_at(b, d),
            size_of(sizes.lookahead * sizes.key),
            memory,
            memory + sizes.key,
            size_of(sizes.memory()),
            sequence + size_of(b) * sizes.rows(),
            bias + bias_at(d),
            scratch.floats,
            scratch.packed};
  }

  // Calls with each of a batch row's tokens whose previous one is of the same sequence: the place of that
  // one's state in a memory, and of the token's in [batch, n, lookahead * state_size].
  template <class Use>
  void for_each_state(int b, int d, const Use& use) const {
    const int32_t* own = sequence + size_of(b) * sizes.rows() + sizes.window;
    const size_t width = size_of(sizes.state);
    for (int t = 0; t < sizes.tokens; ++t) {
      const size_t token = size_of(b) * size_of(sizes.tokens) + size_of(t);
      const size_t row = size_of(sizes.window + t) - 1;
      use(own[t] == own[t - 1], memory_at(b) + row * size_of(sizes.memory()) + size_of(2 * sizes.key),
          (token * size_of(sizes.lookahead) + size_of(d)) * width);
    }
  }
};

Memories memories_of(const Sizes& sizes, const std::vector<mx::array>& inputs) {
  Memories m{sizes, inputs[0].data<float>(), inputs[1].data<float>(), inputs[2].data<int32_t>(), {}};
  for (int d = 0; d < sizes.lookahead; ++d) m.memories.push_back(inputs[size_of(3 + d)].data<float>());
  return m;
}

kernels::Bf16Attention functions(const Sizes& sizes) {
  const kernels::KernelSet& k = kernels::select_kernels();
  return sizes.bf16 ? *k.bf16_attention : kernels::Bf16Attention{k.attend, k.attend_gradient};
}

void read(const Memories& m, float* states, float* attended) {
  const Sizes& sizes = m.sizes;
  const Scratch scratch(sizes);
  const kernels::Attend attend = functions(sizes).attend;
  for (int b = 0; b < sizes.batch; ++b) {
    for (int d = 0; d < sizes.lookahead; ++d) {
      attend(m.attention(b, d, scratch), attended + m.query_at(b, d), size_of(sizes.lookahead * sizes.key));
      m.for_each_state(b, d, [&](bool follows, size_t from, size_t to) {
        if (follows) {
          std::copy_n(m.memories[size_of(d)] + from, sizes.state, states + to);
        } else {
          std::fill_n(states + to, sizes.state, 0.0f);
        }
      });
    }
  }
}

// The memories' and the bias' gradients are added to.
struct ReadGradients {
  float* query;
  float* bias;
  std::vector<float*> memories;
};

void read_gradient(const Memories& m, const float* states, const float* attended, const ReadGradients& to) {
  const Sizes& sizes = m.sizes;
  const Scratch scratch(sizes);
  const kernels::AttendGradient gradient = functions(sizes).gradient;
  for (int b = 0; b < sizes.batch; ++b) {
    for (int d = 0; d < sizes.lookahead; ++d) {
      float* memory = to.memories[size_of(d)];
      float* key = memory + m.memory_at(b);
      gradient(m.attention(b, d, scratch), attended + m.query_at(b, d), size_of(sizes.lookahead * sizes.key),
               {to.query + m.query_at(b, d), key, key + sizes.key, to.bias + m.bias_at(d)});
      m.for_each_state(b, d, [&](bool follows, size_t at, size_t from) {
        if (follows) std::copy_n(states + from, sizes.state, memory + at);
      });
    }
  }
}

// Gives the outputs their memory, and tells the stream's encoder of both sides.
mx::cpu::CommandEncoder& prepare(mx::Stream stream, const std::vector<mx::array>& inputs,
                                 std::vector<mx::array>& outputs) {
  mx::cpu::CommandEncoder& encoder = mx::cpu::get_command_encoder(stream);
  for (const mx::array& input : inputs) encoder.set_input_array(input);
  for (mx::array& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
    encoder.set_output_array(output);
  }
  return encoder;
}

class ReadMemoriesGradient : public mx::Primitive {
 public:
  ReadMemoriesGradient(mx::Stream stream, const Sizes& sizes) : mx::Primitive(stream), sizes_(sizes) {}

  // Outputs: the gradients of the query, the bias and the memories.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mx::cpu::CommandEncoder& encoder = prepare(stream(), inputs, outputs);
    ReadGradients to{outputs[0].data<float>(), outputs[1].data<float>(), {}};
    for (size_t i = 2; i < outputs.size(); ++i) to.memories.push_back(outputs[i].data<float>());
    const size_t bias = outputs[1].size(), memory = outputs[2].size();
    const size_t states = inputs.size() - 2;
    encoder.dispatch([m = memories_of(sizes_, inputs), to, bias, memory, from = inputs[states].data<float>(),
                      attended = inputs[states + 1].data<float>()] {
      std::fill_n(to.bias, bias, 0.0f);
      for (float* gradient : to.memories) std::fill_n(gradient, memory, 0.0f);
      read_gradient(m, from, attended, to);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[read_memories] is made for CPU streams only");
  }

  const char* name() const override { return "ReadMemoriesGradient"; }

 private:
  Sizes sizes_;
};

class ReadMemories : public mx::Primitive {
 public:
  ReadMemories(mx::Stream stream, const Sizes& sizes) : mx::Primitive(stream), sizes_(sizes) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mx::cpu::CommandEncoder& encoder = prepare(stream(), inputs, outputs);
    encoder.dispatch([m = memories_of(sizes_, inputs), states = outputs[0].data<float>(),
                      attended = outputs[1].data<float>()] { read(m, states, attended); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[read_memories] is made for CPU streams only");
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    std::vector<mx::array> inputs = primals;
    for (const mx::array& cotangent : cotangents) inputs.push_back(mx::contiguous(cotangent, false, stream()));
    std::vector<mx::Shape> shapes;
    for (size_t i = 0; i < primals.size(); ++i) {
      if (i != kSequence) shapes.push_back(primals[i].shape());
    }
    const std::vector<mx::Dtype> types(shapes.size(), mx::float32);
    const std::vector<mx::array> gradients = mx::array::make_arrays(
        std::move(shapes), types, std::make_shared<ReadMemoriesGradient>(stream(), sizes_), std::move(inputs));
    std::vector<mx::array> wanted;
    for (const int i : argnums) {
      const size_t at = size_of(i);
      wanted.push_back(at == kSequence ? mx::zeros_like(primals[at], stream()) : gradients[at - (at > kSequence)]);
    }
    return wanted;
  }

  const char* name() const override { return "ReadMemories"; }

 private:
  static constexpr size_t kSequence = 2;
  Sizes sizes_;
};

// A kernel that works on a row in place.
class RowFunction : public mx::UnaryPrimitive {
 public:
  using Kernel = void (*)(const kernels::KernelSet&, float* x, int n);

  RowFunction(mx::Stream stream, const char* name, Kernel kernel)
      : mx::UnaryPrimitive(stream), name_(name), kernel_(kernel) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.set_input_array(inputs[0]);
    encoder.set_output_array(out);
    encoder.dispatch([from = inputs[0].data<float>(), to = out.data<float>(), size = out.size(),
                      row = size_of(out.shape(-1)), kernel = kernel_] {
      const kernels::KernelSet& set = kernels::select_kernels();
      for (size_t i = 0; i < size; i += row) {
        std::copy_n(from + i, row, to + i);
        kernel(set, to + i, static_cast<int>(row));
      }
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(std::string("[") + name_ + "] is made for CPU streams only");
  }

  const char* name() const override { return name_; }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }

 private:
  const char* name_;
  Kernel kernel_;
};

mx::array plain(const mx::array& x, mx::Dtype type, mx::StreamOrDevice s) {
  return mx::contiguous(mx::astype(x, type, s), false, s);
}

mx::array by_row(const mx::array& x, const char* name, RowFunction::Kernel kernel, mx::StreamOrDevice s) {
  if (x.ndim() < 1) throw std::invalid_argument(std::string("[") + name + "] takes rows, got a scalar");
  return mx::array(x.shape(), mx::float32, std::make_shared<RowFunction>(mx::to_stream(s), name, kernel),
                   {plain(x, mx::float32, s)});
}

void require(bool condition, const char* rule) {
  if (!condition) throw std::invalid_argument(std::string("[read_memories] ") + rule);
}

Sizes check(const mx::array& query, const mx::array& bias, const mx::array& sequence,
            const std::vector<mx::array>& memories, bool bf16) {
  require(!bf16 || kernels::select_kernels().bf16_attention, "this CPU has no instructions for products in bfloat16");
  require(query.ndim() == 3 && bias.ndim() == 2 && bias.shape(1) > 1, "query is [batch, n, c], position_bias [d, w]");
  const int lookahead = bias.shape(0);
  Sizes sizes{query.shape(0), query.shape(1), lookahead, bias.shape(1) - 1, query.shape(2) / lookahead, 0, bf16};
  require(query.shape(2) == lookahead * sizes.key && sizes.key > 0, "query holds one key for each distance");
  require(memories.size() == size_of(lookahead), "there is one memory for each distance");
  sizes.state = memories[0].shape(-1) - 2 * sizes.key;
  require(sizes.state >= 0, "a memory holds a key, a value and a state");
  const mx::Shape expected = {sizes.batch, sizes.window + sizes.tokens, sizes.memory()};
  for (const mx::array& memory : memories) require(memory.shape() == expected, "memories are [batch, w - 1 + n, m]");
  require(sequence.shape() == mx::Shape{sizes.batch, sizes.window + sizes.tokens}, "sequence is [batch, w - 1 + n]");
  return sizes;
}

}  // namespace

std::vector<mx::array> read_memories(const mx::array& query, const mx::array& position_bias, const mx::array& sequence,
                                     const std::vector<mx::array>& memories, bool bf16, mx::StreamOrDevice s) {
  const Sizes sizes = check(query, position_bias, sequence, memories, bf16);
  std::vector<mx::array> inputs = {plain(query, mx::float32, s), plain(position_bias, mx::float32, s),
                                   plain(sequence, mx::int32, s)};
  for (const mx::array& memory : memories) inputs.push_back(plain(memory, mx::float32, s));
  return mx::array::make_arrays({{sizes.batch, sizes.tokens, sizes.lookahead * sizes.state}, query.shape()},
                                {mx::float32, mx::float32}, std::make_shared<ReadMemories>(mx::to_stream(s), sizes),
                                std::move(inputs));
}

mx::array row_softmax(const mx::array& x, mx::StreamOrDevice s) {
  constexpr float kNothing = -1e30f;  // no share for it
  const auto kernel = [](const kernels::KernelSet& k, float* row, int n) { k.softmax(row, n, kNothing); };
  return by_row(x, "row_softmax", kernel, s);
}

mx::array row_sigmoid(const mx::array& x, mx::StreamOrDevice s) {
  const auto kernel = [](const kernels::KernelSet& k, float* row, int n) { k.sigmoid(row, n); };
  return by_row(x, "row_sigmoid", kernel, s);
}

}  // namespace mlx_od_moe
