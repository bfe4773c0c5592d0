//! Faults in the answers to BLOCK_STATUS.

use diskmover::error::Code;

use crate::server::*;
use crate::table::Must::{Cope, Fail};
use crate::table::*;

#[test]
fn block_status() {
    use Code::SourceIo;
    const READ: &str = "what a server does not know has to be read";
    let at_start = Some(0);
    all_as_they_must(vec![
        fault(
            "it reports an error",
            READ,
            status(|c, r| c.fail(ERROR, r.cookie, 95, b"not here")),
            Cope,
        ),
        fault(
            "it says nothing of it",
            READ,
            status(|c, r| c.chunk(DONE, NONE, r.cookie, &[])),
            Cope,
        ),
        fault(
            "it says something, and then an error",
            READ,
            status(|c, r| {
                c.extents(0, r.cookie, ALLOCATION, &[(r.len, 2)])?;
                c.fail(ERROR, r.cookie, EIO, b"not so")
            }),
            Cope,
        ),
        fault(
            "an extent has no length",
            "there would be no progress",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(0, 2), (r.len, 2)])),
            Cope,
        ),
        fault(
            "an extent has no length, after one that has",
            "what follows is not believed",
            status(|c, r| match r.offset {
                0 => c.extents(
                    DONE,
                    r.cookie,
                    ALLOCATION,
                    &[(512, 0), (0, 2), (r.len - 512, 2)],
                ),
                _ => c.answer_status(r),
            }),
            Cope,
        ),
        fault(
            "extents reach beyond the end",
            "what lies there is nobody's",
            status(|c, r| match r.offset {
                0 => c.extents(DONE, r.cookie, ALLOCATION, &[(u32::MAX, 0), (u32::MAX, 2)]),
                _ => c.answer_status(r),
            }),
            Cope,
        ),
        fault(
            "it tells of 512 bytes at a time",
            "less is known, no more",
            status(|c, r| {
                let hole = HOLE.contains(&r.offset);
                c.extents(
                    DONE,
                    r.cookie,
                    ALLOCATION,
                    &[(512, if hole { 3 } else { 0 })],
                )
            }),
            Cope,
        ),
        fault(
            "it sets flags that nobody knows",
            "only ZERO lets us skip",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, !2)])),
            Cope,
        ),
        fault(
            "it calls data a hole, and not zero",
            "a hole may read as anything",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, 1)])),
            Cope,
        ),
        fault(
            "it lists nothing",
            BROKEN,
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[])),
            Fail(SourceIo, "a block status of 4 bytes", at_start),
        ),
        fault(
            "half an extent is missing",
            BROKEN,
            status(|c, r| c.chunk(DONE, STATUS, r.cookie, &[0; 17])),
            Fail(SourceIo, "a block status of 17 bytes", at_start),
        ),
        fault(
            "its list is as long as can be said",
            LIMITS,
            status(|c, r| c.chunk_head(DONE, STATUS, r.cookie, u32::MAX - 3)),
            Fail(SourceIo, "a block status of 4294967292 bytes", at_start),
        ),
        fault(
            "it is about another context",
            "its flags mean something else",
            status(|c, r| c.extents(DONE, r.cookie, ALLOCATION + 1, &[(r.len, 2)])),
            Fail(SourceIo, "not asked for", at_start),
        ),
        fault(
            "it is told twice",
            "the second would follow where the first ends",
            status(|c, r| {
                c.extents(0, r.cookie, ALLOCATION, &[(r.len, 0)])?;
                c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, 2)])
            }),
            Fail(SourceIo, "not asked for", at_start),
        ),
        fault(
            "it is for another cookie",
            BROKEN,
            status(|c, r| c.extents(DONE, r.cookie + 9, ALLOCATION, &[(r.len, 2)])),
            Fail(SourceIo, "a reply to no request", at_start),
        ),
        fault(
            "content comes instead",
            BROKEN,
            status(|c, r| c.data(DONE, r.cookie, 0..512)),
            Fail(SourceIo, "a chunk of kind 0x1", at_start),
        ),
        fault(
            "it does not answer",
            DEADLINE,
            status(|c, _| c.stall()),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it hangs up",
            "nobody is there",
            status(|c, _| c.hang_up()),
            Fail(SourceIo, "closed the connection", at_start),
        ),
    ]);
}
