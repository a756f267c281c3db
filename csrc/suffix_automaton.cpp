#include "suffix_automaton.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace hedgespec {

namespace {

// Suffixes whose counts a new token updates, the longest first. Repetitive texts have as many as tokens, and a draft follows the
// longest anyway.
constexpr int kMostSuffixes = 32;

std::uint64_t hash(std::int32_t state, std::int32_t token) {
  std::uint64_t key = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(state)) << 32) ^ static_cast<std::uint32_t>(token);
  key *= 0x9E3779B97F4A7C15ull;  // Fibonacci hashing (Knuth); the high bits are the good ones
  return key ^ (key >> 29);
}

}  // namespace

SuffixAutomaton::SuffixAutomaton(std::int64_t max_tokens) : max_tokens_(max_tokens) { clear(); }

void SuffixAutomaton::clear() {
  states_.clear();
  edges_.clear();
  table_.assign(64, -1);
  now_ = 0;
  new_state(0, -1);
}

std::int64_t SuffixAutomaton::open() {
  texts_.emplace(next_text_, Text{});
  order_.push_back(next_text_);
  return next_text_++;
}

void SuffixAutomaton::close(std::int64_t text) {
  const auto found = texts_.find(text);
  if (found == texts_.end()) return;
  found->second.open = false;
  if (found->second.tokens.empty()) {
    texts_.erase(found);
    order_.erase(std::find(order_.begin(), order_.end(), text));
  }
}

bool SuffixAutomaton::is_open(std::int64_t text) const {
  const auto found = texts_.find(text);
  return found != texts_.end() && found->second.open;
}

std::int32_t SuffixAutomaton::new_state(std::int32_t length, std::int32_t link) {
  if (states_.size() >= 0x7fffffff) throw std::length_error("SuffixAutomaton: expected fewer than 2^31 states");
  states_.push_back({length, link, -1, -1, 0});
  return static_cast<std::int32_t>(states_.size()) - 1;
}

std::int32_t SuffixAutomaton::find(std::int32_t state, std::int32_t token) const {
  const std::size_t mask = table_.size() - 1;
  for (std::size_t slot = hash(state, token) & mask;; slot = (slot + 1) & mask) {
    const std::int32_t edge = table_[slot];
    if (edge < 0 || (edges_[edge].from == state && edges_[edge].token == token)) return edge;
  }
}

std::int32_t SuffixAutomaton::add(std::int32_t state, std::int32_t token, std::int32_t to, std::uint32_t count,
                                  std::uint32_t when) {
  if (2 * (edges_.size() + 1) > table_.size()) grow_table();
  const auto edge = static_cast<std::int32_t>(edges_.size());
  State& from = states_[state];
  edges_.push_back({state, token, to, from.first, count, when});
  from.first = edge;
  from.total += count;
  if (from.best < 0 || count > edges_[from.best].count || (count == edges_[from.best].count && when >= edges_[from.best].when)) {
    from.best = edge;
  }
  const std::size_t mask = table_.size() - 1;
  std::size_t slot = hash(state, token) & mask;
  while (table_[slot] >= 0) slot = (slot + 1) & mask;
  table_[slot] = edge;
  return edge;
}

void SuffixAutomaton::grow_table() {
  table_.assign(2 * table_.size(), -1);
  const std::size_t mask = table_.size() - 1;
  for (std::size_t edge = 0; edge < edges_.size(); ++edge) {
    std::size_t slot = hash(edges_[edge].from, edges_[edge].token) & mask;
    while (table_[slot] >= 0) slot = (slot + 1) & mask;
    table_[slot] = static_cast<std::int32_t>(edge);
  }
}

void SuffixAutomaton::follow(std::int32_t edge) {
  Edge& followed = edges_[edge];
  State& from = states_[followed.from];
  ++followed.count;
  ++from.total;
  followed.when = now_;
  if (followed.count >= edges_[from.best].count) from.best = edge;  // the latest of equally frequent ones
}

std::int32_t SuffixAutomaton::extend(std::int32_t state, std::int32_t token) {
  ++now_;
  const std::int32_t current = new_state(states_[state].length + 1, 0);
  // Suffixes of the text that were never followed by the token.
  std::int32_t suffix = state;
  std::int32_t edge = -1;
  while (suffix >= 0 && (edge = find(suffix, token)) < 0) {
    add(suffix, token, current, 1, now_);
    suffix = states_[suffix].link;
  }
  if (suffix < 0) return current;
  // The longest suffix that was: what it led to is the new state's suffix, if that state has no longer string.
  std::int32_t target = edges_[edge].to;
  if (states_[target].length != states_[suffix].length + 1) {
    const std::int32_t clone = new_state(states_[suffix].length + 1, states_[target].link);
    // Every occurrence of the long strings is one of the short ones, so the clone begins with their counts.
    std::vector<std::int32_t> copied;
    for (std::int32_t one = states_[target].first; one >= 0; one = edges_[one].next) copied.push_back(one);
    for (auto one = copied.rbegin(); one != copied.rend(); ++one) {
      const Edge old = edges_[*one];
      add(clone, old.token, old.to, old.count, old.when);
    }
    for (std::int32_t one = suffix; one >= 0; one = states_[one].link) {
      const std::int32_t redirected = find(one, token);
      if (edges_[redirected].to != target) break;
      edges_[redirected].to = clone;
    }
    states_[target].link = clone;
    target = clone;
  }
  states_[current].link = target;
  for (int count = 0; suffix >= 0 && count < kMostSuffixes; ++count, suffix = states_[suffix].link) {
    follow(find(suffix, token));
  }
  return current;
}

SuffixAutomaton::Match SuffixAutomaton::match(const Text& text) const {
  const std::int32_t link = states_[text.state].link;
  if (link < 0) return {0, 0};
  return {link, states_[link].length};
}

SuffixAutomaton::Match SuffixAutomaton::advance(Match match, std::int32_t token) const {
  for (;;) {
    const std::int32_t edge = find(match.state, token);
    if (edge >= 0) return {edges_[edge].to, match.length + 1};
    if (match.state == 0) return {0, 0};
    match.state = states_[match.state].link;
    match.length = states_[match.state].length;
  }
}

Continuation SuffixAutomaton::continuation(Match match) const {
  while (match.state > 0 && states_[match.state].best < 0) {  // it occurs at the ends of texts only
    match.state = states_[match.state].link;
    match.length = states_[match.state].length;
  }
  if (match.state <= 0) return {-1, 0, 0, 0};
  const State& state = states_[match.state];
  const Edge& best = edges_[state.best];
  return {best.token, match.length, best.count, state.total};
}

void SuffixAutomaton::append(std::int64_t number, const std::int64_t* tokens, std::int64_t count, std::int64_t keep,
                             Continuation* continuations) {
  Text& text = texts_.at(number);
  for (std::int64_t index = 0; index < count; ++index) {
    const auto token = static_cast<std::int32_t>(tokens[index]);
    text.state = extend(text.state, token);
    text.tokens.push_back(token);
    ++tokens_;
    if (index >= count - keep) continuations[index - (count - keep)] = continuation(match(text));
  }
  if (max_tokens_ > 0 && tokens_ > max_tokens_) evict();
}

Continuation SuffixAutomaton::after(std::int64_t number, const std::int64_t* drafted, std::int64_t count) const {
  Match found = match(texts_.at(number));
  for (std::int64_t index = 0; index < count; ++index) found = advance(found, static_cast<std::int32_t>(drafted[index]));
  return continuation(found);
}

std::vector<Continuation> SuffixAutomaton::all_after(std::int64_t number, const std::int64_t* drafted, std::int64_t count,
                                                     std::int64_t most) const {
  Match found = match(texts_.at(number));
  for (std::int64_t index = 0; index < count; ++index) found = advance(found, static_cast<std::int32_t>(drafted[index]));
  while (found.state > 0 && states_[found.state].best < 0) {
    found.state = states_[found.state].link;
    found.length = states_[found.state].length;
  }
  std::vector<std::int32_t> all;
  if (found.state > 0) {
    for (std::int32_t edge = states_[found.state].first; edge >= 0; edge = edges_[edge].next) all.push_back(edge);
  }
  std::sort(all.begin(), all.end(), [&](std::int32_t left, std::int32_t right) {
    const Edge &one = edges_[left], &other = edges_[right];
    return one.count != other.count ? one.count > other.count : one.when > other.when;
  });
  if (static_cast<std::int64_t>(all.size()) > most) all.resize(most);
  std::vector<Continuation> result;
  for (const std::int32_t edge : all) {
    result.push_back({edges_[edge].token, found.length, edges_[edge].count, states_[found.state].total});
  }
  return result;
}

std::int64_t SuffixAutomaton::draft(std::int64_t number, std::int64_t count, Continuation* continuations) const {
  Match found = match(texts_.at(number));
  for (std::int64_t index = 0; index < count; ++index) {
    const Continuation next = continuation(found);
    if (next.token < 0) return index;
    continuations[index] = next;
    found = advance(found, next.token);
  }
  return count;
}

std::int64_t SuffixAutomaton::bytes() const {
  std::size_t total = states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) + table_.capacity() * sizeof(std::int32_t);
  for (const auto& [_, text] : texts_) total += text.tokens.capacity() * sizeof(std::int32_t);
  return static_cast<std::int64_t>(total);
}

std::vector<std::vector<std::int32_t>> SuffixAutomaton::texts() const {
  std::vector<std::vector<std::int32_t>> result;
  for (const std::int64_t number : order_) result.push_back(texts_.at(number).tokens);
  return result;
}

void SuffixAutomaton::evict() {
  // The newest texts that fit into half of what is allowed, and of every open text at least its end.
  std::int64_t room = max_tokens_ / 2;
  for (auto number = order_.rbegin(); number != order_.rend(); ++number) {
    std::vector<std::int32_t>& tokens = texts_.at(*number).tokens;
    const auto size = static_cast<std::int64_t>(tokens.size());
    const std::int64_t kept = std::min(size, room);
    tokens.erase(tokens.begin(), tokens.end() - kept);
    room -= kept;
  }
  std::deque<std::int64_t> left;
  for (const std::int64_t number : order_) {
    const Text& text = texts_.at(number);
    if (text.open || !text.tokens.empty()) {
      left.push_back(number);
    } else {
      texts_.erase(number);
    }
  }
  order_.swap(left);
  clear();
  tokens_ = 0;
  for (const std::int64_t number : order_) {
    Text& text = texts_.at(number);
    text.state = 0;
    for (const std::int32_t token : text.tokens) text.state = extend(text.state, token);
    tokens_ += static_cast<std::int64_t>(text.tokens.size());
  }
}

}  // namespace hedgespec
