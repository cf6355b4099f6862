// Argument checks. They throw and never end the process: Python sees an ordinary exception
// (ValueError from fastlora._core, RuntimeError through a torch op).
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastlora {

// Throws std::invalid_argument with the parts joined when `ok` is false.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace fastlora
