//! What holds for any input: the planner, whatever a map says, and the journal,
//! whatever became of its bytes.

#![allow(missing_docs)]

mod journal;
mod plan;
