// An index of texts that grow: for any of them, the longest suffix that also occurs earlier, here or in another text, and what
// followed it there.
//
// Sources: Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985 (the automaton, built online); Oliaro
// et al., "SuffixDecoding", arXiv 2411.04975 (drafting from it). A text begins at the initial state, so several texts share one
// automaton; a text's own state is never shared, since what follows the text is not known yet.

#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

namespace hedgespec {

// What followed the longest match.
struct Continuation {
  std::int32_t token;   // the most frequent next token, the latest of equally frequent ones; -1: nothing matches
  std::int32_t length;  // tokens that match
  std::uint32_t count;  // occurrences that went on with `token`
  std::uint32_t total;  // occurrences in all
};

class SuffixAutomaton {
 public:
  // max_tokens: once the texts hold more, the oldest are dropped until half of it is left; 0 stands for no limit.
  explicit SuffixAutomaton(std::int64_t max_tokens);

  std::int64_t open();             // begins a text and returns its number
  void close(std::int64_t text);   // nothing will be appended to it
  bool is_open(std::int64_t text) const;

  // Appends `count` tokens. After each of the last `keep` of them, writes what the index says then into continuations[keep].
  void append(std::int64_t text, const std::int64_t* tokens, std::int64_t count, std::int64_t keep,
              Continuation* continuations);

  // What the index says after the text and `count` drafted tokens behind it.
  Continuation after(std::int64_t text, const std::int64_t* drafted, std::int64_t count) const;

  // The same with every next token, at most `most`, the most frequent first.
  std::vector<Continuation> all_after(std::int64_t text, const std::int64_t* drafted, std::int64_t count,
                                      std::int64_t most) const;

  // Follows the likeliest tokens behind the text. Writes at most `count` and returns how many.
  std::int64_t draft(std::int64_t text, std::int64_t count, Continuation* continuations) const;

  std::int64_t tokens() const { return tokens_; }  // held by all texts
  std::int64_t bytes() const;                      // allocated
  std::vector<std::vector<std::int32_t>> texts() const;  // oldest first

 private:
  struct State {
    std::int32_t length;  // of its longest string
    std::int32_t link;    // the state of its longest suffix that occurs elsewhere too; -1 for the initial state
    std::int32_t first;   // its first edge; -1: none
    std::int32_t best;    // its most frequent edge
    std::uint32_t total;  // sum of its edges' counts
  };
  struct Edge {
    std::int32_t from, token, to;
    std::int32_t next;    // of the same state; -1: none
    std::uint32_t count;  // how often it was followed
    std::uint32_t when;   // last
  };
  struct Text {
    std::vector<std::int32_t> tokens;
    std::int32_t state = 0;
    bool open = true;
  };
  struct Match {
    std::int32_t state, length;
  };

  std::int32_t new_state(std::int32_t length, std::int32_t link);
  std::int32_t find(std::int32_t state, std::int32_t token) const;  // an edge, or -1
  std::int32_t add(std::int32_t state, std::int32_t token, std::int32_t to, std::uint32_t count, std::uint32_t when);
  void follow(std::int32_t edge);  // counts one more time that the edge was followed
  void grow_table();
  std::int32_t extend(std::int32_t state, std::int32_t token);  // the automaton's step; returns the text's new state
  Match match(const Text& text) const;
  Match advance(Match match, std::int32_t token) const;
  Continuation continuation(Match match) const;
  void clear();
  void evict();

  std::int64_t max_tokens_, tokens_ = 0, next_text_ = 0;
  std::uint32_t now_ = 0;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<std::int32_t> table_;  // open addressing: edges by (from, token)
  std::unordered_map<std::int64_t, Text> texts_;
  std::deque<std::int64_t> order_;  // oldest first
};

}  // namespace hedgespec
