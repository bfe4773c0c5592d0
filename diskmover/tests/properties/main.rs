//! What holds for any input: the planner, whatever a map says, the journal, whatever
//! became of its bytes, and the ledger, whatever it is told.

#![allow(missing_docs)]

mod journal;
mod ledger;
mod plan;

#[allow(dead_code)]
#[path = "../wire/sample.rs"]
mod sample;
