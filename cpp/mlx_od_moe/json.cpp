#include "mlx_od_moe/json.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace mlx_od_moe {

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("nothing may follow the value");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 32;

  [[noreturn]] void fail(const std::string& rule) const {
    throw std::invalid_argument("bad JSON at byte " + std::to_string(at_) + ": " + rule);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  bool accept(char c) {
    skip_space();
    if (peek() != c || at_ == text_.size()) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "'");
  }

  bool accept_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse_value(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    skip_space();
    Json json;
    if (peek() == '{') {
      json.value_ = parse_object(depth);
    } else if (peek() == '[') {
      json.value_ = parse_array(depth);
    } else if (peek() == '"') {
      json.value_ = parse_string();
    } else if (accept_word("true")) {
      json.value_ = true;
    } else if (accept_word("false")) {
      json.value_ = false;
    } else if (!accept_word("null")) {
      json.value_ = parse_number();
    }
    return json;
  }

  Json::Object parse_object(int depth) {
    Json::Object object;
    expect('{');
    if (accept('}')) return object;
    do {
      skip_space();
      std::string key = parse_string();
      expect(':');
      if (!object.emplace(std::move(key), parse_value(depth + 1)).second) fail("a key occurs twice");
    } while (accept(','));
    expect('}');
    return object;
  }

  Json::Array parse_array(int depth) {
    Json::Array array;
    expect('[');
    if (accept(']')) return array;
    do {
      array.push_back(parse_value(depth + 1));
    } while (accept(','));
    expect(']');
    return array;
  }

  double parse_number() {
    const size_t begin = at_;
    while (at_ < text_.size() && std::string_view("+-.eE0123456789").find(text_[at_]) != std::string_view::npos) ++at_;
    // Most are whole: a stream for each would take most of the time that a large header does.
    int64_t whole = 0;
    const char* end = text_.data() + at_;
    if (const auto read = std::from_chars(text_.data() + begin, end, whole);
        read.ec == std::errc() && read.ptr == end) {
      return static_cast<double>(whole);
    }
    // A stream, since from_chars for doubles came late to some standard libraries, and strtod follows the locale.
    std::istringstream stream{std::string(text_.substr(begin, at_ - begin))};
    stream.imbue(std::locale::classic());
    double value = 0;
    if (begin == at_ || !(stream >> value) || stream.peek() != std::istringstream::traits_type::eof()) {
      at_ = begin;
      fail("expected a value");
    }
    return value;
  }

  std::string parse_string() {
    if (peek() != '"') fail("expected a string");
    ++at_;
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character in a string");
      if (text_[at_] != '\\') {
        out += text_[at_++];
        continue;
      }
      ++at_;
      append_escape(out);
    }
    if (at_ >= text_.size()) fail("a string without end");
    ++at_;
    return out;
  }

  void append_escape(std::string& out) {
    static constexpr std::string_view kEscapes = "\"\\/bfnrt";
    static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (const size_t i = kEscapes.find(c); i != std::string_view::npos && c != '\0') {
      out += kMeanings[i];
      ++at_;
    } else if (c == 'u') {
      ++at_;
      append_utf8(parse_code_point(), out);
    } else {
      fail("an unknown escape in a string");
    }
  }

  uint32_t parse_hex() {
    if (text_.size() - at_ < 4) fail("expected four hexadecimal digits");
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = text_[at_];
      uint32_t digit = 0;
      if (c >= '0' && c <= '9') {
        digit = static_cast<uint32_t>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        digit = static_cast<uint32_t>(c - 'a' + 10);
      } else if (c >= 'A' && c <= 'F') {
        digit = static_cast<uint32_t>(c - 'A' + 10);
      } else {
        fail("expected four hexadecimal digits");
      }
      value = value * 16 + digit;
    }
    return value;
  }

  uint32_t parse_code_point() {
    const uint32_t first = parse_hex();
    if (first < 0xd800 || first > 0xdfff) return first;
    if (first > 0xdbff || !accept_word("\\u")) fail("half of a surrogate pair");
    const uint32_t second = parse_hex();
    if (second < 0xdc00 || second > 0xdfff) fail("half of a surrogate pair");
    return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
  }

  static void append_utf8(uint32_t point, std::string& out) {
    const auto add = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (point < 0x80) {
      add(point);
    } else if (point < 0x800) {
      add(0xc0 | point >> 6);
      add(0x80 | (point & 63));
    } else if (point < 0x10000) {
      add(0xe0 | point >> 12);
      add(0x80 | (point >> 6 & 63));
      add(0x80 | (point & 63));
    } else {
      add(0xf0 | point >> 18);
      add(0x80 | (point >> 12 & 63));
      add(0x80 | (point >> 6 & 63));
      add(0x80 | (point & 63));
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

void Json::refuse(const char* what) { throw std::invalid_argument(std::string("a value should be ") + what); }

int64_t Json::integer() const {
  const double value = number();
  if (std::abs(value) > 9007199254740992.0 || value != std::floor(value)) refuse("a whole number");
  return static_cast<int64_t>(value);
}

int Json::small_integer() const {
  const int64_t value = integer();
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) refuse("a smaller number");
  return static_cast<int>(value);
}

const Json& Json::at(const std::string& key) const {
  const Object& members = object();
  const auto found = members.find(key);
  if (found == members.end()) throw std::invalid_argument("'" + key + "' is missing");
  return found->second;
}

}  // namespace mlx_od_moe
