// FASTLORA_OFF=step,step: what is switched off while looking for a fault (fastlora/switches.py).
#pragma once

#include <cstdlib>
#include <string>

namespace fastlora {

inline bool switched_off(const char* step) {
  const char* const given = std::getenv("FASTLORA_OFF");
  if (given == nullptr) return false;
  std::string list = ",";
  for (const char* c = given; *c != 0; ++c) {
    if (*c != ' ') list += *c;
  }
  return (list + ",").find("," + std::string(step) + ",") != std::string::npos;
}

}  // namespace fastlora
