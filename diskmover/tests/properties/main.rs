//! What holds for any input: the planner, whatever a map says, and STATE of a copy that
//! goes on; the journal, whatever became of its bytes; and the ledger, whatever it is told.

#![allow(missing_docs)]

mod journal;
mod ledger;
mod plan;
mod resume;

#[allow(dead_code)]
#[path = "../wire/sample.rs"]
mod sample;
