// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <string>

namespace bsfa {

// The JSON object of bsfa_build_info().
std::string build_info();

}  // namespace bsfa
