// A JSON value, as it stands in the headers of safetensors files. Only what those need.
//
// Ownership  A value owns its parts.
// Errors     std::invalid_argument saying what is wrong and at which byte; missing keys and values of
//            another kind too. No input makes it crash: nesting is limited to 32.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace mlx_od_moe {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  static Json parse(std::string_view text);

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool boolean() const { return get<bool>("true or false"); }
  double number() const { return get<double>("a number"); }
  int64_t integer() const;  // a number without fraction, at most 2^53
  int small_integer() const;
  const std::string& string() const { return get<std::string>("a string"); }
  const Array& array() const { return get<Array>("an array"); }
  const Object& object() const { return get<Object>("an object"); }
  const Json& at(const std::string& key) const;  // of an object

 private:
  friend class JsonParser;
  template <class T>
  const T& get(const char* what) const {
    if (const T* held = std::get_if<T>(&value_)) return *held;
    refuse(what);
  }
  [[noreturn]] static void refuse(const char* what);

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
};

}  // namespace mlx_od_moe
