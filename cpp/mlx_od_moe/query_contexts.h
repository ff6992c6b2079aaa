// The contexts of a query's tokens: one for all of them, or for a batch's each its own.
//
// Threads    The predicting thread.
// Ownership  Points into the table, until it comes to a change: a later place's. A query that `give` filled
//            points here, until the next `find`.
// Errors     Those of SequenceTable::context and SequenceContext::observe.
// Costs      Allocates where there are more sequences than there ever were.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "mlx_od_moe/sequence_table.h"

namespace mlx_od_moe {

class QueryContexts {
 public:
  QueryContexts() { reserve(1); }

  // One place: of all the query's tokens. Several: of one token each.
  void find(SequenceTable& table, std::span<const SequencePlace> places) {
    contexts_.clear();
    rows_.clear();
    reserve(places.size());
    for (const SequencePlace& place : places) {
      contexts_.push_back(&table.context(place));
      rows_.push_back({contexts_.back(), place.position});
    }
  }

  size_t size() const { return contexts_.size(); }

  // What they left is what the query is predicted with.
  void give(Query& query) const {
    if (size() == 1) {
      query.sequence = contexts_.front();
      query.position = rows_.front().position;
    } else {
      query.rows = rows_.data();
    }
  }

  // The i-th one's tokens have passed the layer.
  void observe(size_t i, int layer, const Query& query) {
    if (size() == 1) {
      Query states = query;
      states.position = rows_[i].position;
      contexts_[i]->observe(layer, states);
    } else {
      contexts_[i]->observe_row(layer, query, static_cast<int>(i), rows_[i].position);
    }
  }

 private:
  void reserve(size_t n) {
    contexts_.reserve(n);
    rows_.reserve(n);
  }

  std::vector<SequenceContext*> contexts_;
  std::vector<QueryRow> rows_;
};

}  // namespace mlx_od_moe
