// ExpertFile for Python: the native part of mlx_od_moe.expert_file.ExpertFile, and what pack needs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <system_error>

#include "bindings.h"
#include "mlx_od_moe/crc32c.h"
#include "mlx_od_moe/expert_file.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx_od_moe::ExpertFile;
using mlx_od_moe::ExpertPart;
using mlx_od_moe::StoredTensor;

namespace {

using Bytes = nb::ndarray<uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Runs without the GIL. What the system reports becomes OSError, or its subclass for that error.
template <class Run>
auto without_gil(const Run& run) {
  try {
    nb::gil_scoped_release release;
    return run();
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
    throw nb::python_error();
  }
}

nb::tuple shape_of(const std::vector<int64_t>& shape) {
  nb::list sizes;
  for (const int64_t n : shape) sizes.append(n);
  return nb::tuple(sizes);
}

std::shared_ptr<ExpertFile> open_file(const std::string& path) {
  return without_gil([&] { return std::const_pointer_cast<ExpertFile>(ExpertFile::open(path)); });
}

nb::list layers(const ExpertFile& file) {
  nb::list out;
  for (const mlx_od_moe::ExpertLayer& layer : file.layout().layers) out.append(layer.layer);
  return out;
}

nb::list parts(const ExpertFile& file, int layer) {
  nb::list out;
  for (const ExpertPart& part : file.layer(layer).parts) {
    out.append(nb::make_tuple(part.name, part.dtype, shape_of(part.shape), part.bytes));
  }
  return out;
}

nb::list rest(const ExpertFile& file) {
  nb::list out;
  for (const auto& [index, entry] : file.rest()) {
    out.append(nb::make_tuple(entry.name, entry.dtype, shape_of(entry.shape), index, entry.offset, entry.bytes));
  }
  return out;
}

template <class Read>
Bytes new_bytes(size_t bytes, const Read& read) {
  auto* data = new uint8_t[bytes > 0 ? bytes : 1];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  without_gil([&] { read(data); });
  return Bytes(data, {bytes}, owner);
}

Bytes read_expert(const ExpertFile& file, int layer, int expert) {
  return new_bytes(file.layer(layer).expert_bytes(), [&](uint8_t* out) { file.read(layer, expert, out); });
}

Bytes read_bytes(const ExpertFile& file, int32_t index, uint64_t offset, uint64_t bytes) {
  if (index < 0 || static_cast<size_t>(index) >= file.layout().files.size()) throw nb::index_error("no such file");
  if (offset > file.file_bytes(index) || bytes > file.file_bytes(index) - offset) {
    throw nb::value_error("[ExpertFile] these bytes lie outside the file");
  }
  return new_bytes(bytes, [&](uint8_t* out) { file.read_bytes(index, offset, bytes, out); });
}

}  // namespace

void bind_expert_file(nb::module_& m) {
  m.def(
      "crc32c",
      [](const ConstBytes& data, uint32_t before) {
        nb::gil_scoped_release release;
        return mlx_od_moe::crc32c(data.data(), data.size(), before);
      },
      "data"_a, "before"_a = 0, nb::sig("def crc32c(data: object, before: int = 0) -> int"),
      "The CRC-32C of bytes, appended to those that `before` is the checksum of.");

  nb::class_<ExpertFile>(m, "ExpertFile", "See mlx_od_moe.expert_file.ExpertFile.")
      .def(nb::new_(&open_file), "path"_a)
      .def_prop_ro("path", &ExpertFile::path)
      .def_prop_ro("is_packed", [](const ExpertFile& f) { return f.kind() == ExpertFile::Kind::packed; })
      .def_prop_ro("files", [](const ExpertFile& f) { return f.layout().files; })
      .def_prop_ro("metadata", &ExpertFile::metadata)
      .def_prop_ro("layers", &layers, nb::sig("def layers(self) -> list[int]"))
      .def_prop_ro("rest", &rest, nb::sig("def rest(self) -> list[tuple[str, str, tuple[int, ...], int, int, int]]"),
                   "What is no expert: (name, dtype, shape, index of file, offset, bytes).")
      .def(
          "num_experts", [](const ExpertFile& f, int layer) { return f.layer(layer).num_experts; }, "layer"_a)
      .def(
          "expert_bytes", [](const ExpertFile& f, int layer) { return f.layer(layer).expert_bytes(); }, "layer"_a)
      .def(
          "block_bytes", [](const ExpertFile& f, int layer) { return f.layer(layer).block_bytes; }, "layer"_a)
      .def(
          "checksums", [](const ExpertFile& f, int layer) { return f.layer(layer).checksums; }, "layer"_a)
      .def("parts", &parts, "layer"_a,
           nb::sig("def parts(self, layer: int) -> list[tuple[str, str, tuple[int, ...], int]]"),
           "(name, dtype, shape, bytes) of each.")
      .def("read", &read_expert, "layer"_a, "expert"_a,
           nb::sig("def read(self, layer: int, expert: int) -> numpy.typing.NDArray[numpy.uint8]"))
      .def("read_bytes", &read_bytes, "file"_a, "offset"_a, "bytes"_a,
           nb::sig("def read_bytes(self, file: int, offset: int, bytes: int) -> numpy.typing.NDArray[numpy.uint8]"))
      .def("check", [](const ExpertFile& f) { without_gil([&] { f.check(); }); });
}
