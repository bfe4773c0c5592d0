//! Faults in the answers to READ.

use diskmover::error::Code;

use crate::HASTY;
use crate::server::*;
use crate::table::Must::{Cope, Fail};
use crate::table::*;

#[test]
fn reads() {
    use Code::SourceIo;
    const TWICE: &str = "old bytes of a buffer would pass for content";
    let at_start = Some(0);
    all_as_they_must(vec![
        fault(
            "a chunk has another magic",
            BROKEN,
            read(|c, _| c.send(&[0x55; 20])),
            Fail(SourceIo, "something else than a structured reply", at_start),
        ),
        fault(
            "it answers simply though chunks were agreed on",
            BROKEN,
            read(|c, r| c.simple(0, r.cookie, &[0; 4])),
            Fail(SourceIo, "something else than a structured reply", at_start),
        ),
        fault(
            "a chunk is of an unknown kind",
            "what it means for the content is not known",
            read(|c, r| c.chunk(DONE, 77, r.cookie, &[0; 9])),
            Fail(SourceIo, "a chunk of kind 0x4d with 9 bytes", at_start),
        ),
        fault(
            "an empty chunk has a body",
            BROKEN,
            read(|c, r| c.chunk(DONE, NONE, r.cookie, &[0; 9])),
            Fail(SourceIo, "a chunk of kind 0x0 with 9 bytes", at_start),
        ),
        fault(
            "a block status answers a read",
            BROKEN,
            read(|c, r| c.extents(DONE, r.cookie, ALLOCATION, &[(r.len, 2)])),
            Fail(SourceIo, "a chunk of kind 0x5", at_start),
        ),
        fault(
            "the answer is for another cookie",
            TWICE,
            read(|c, r| c.data(DONE, r.cookie + 1000, r.offset..r.offset + 1)),
            Fail(SourceIo, "a reply to no request", at_start),
        ),
        fault(
            "it is done without content",
            TWICE,
            read(|c, r| c.chunk(DONE, NONE, r.cookie, &[])),
            Fail(SourceIo, "not answered in full", at_start),
        ),
        fault(
            "the last byte is missing",
            TWICE,
            read(|c, r| c.data(DONE, r.cookie, r.offset..r.offset + u64::from(r.len) - 1)),
            Fail(SourceIo, "not answered in full", at_start),
        ),
        fault(
            "the middle is missing",
            TWICE,
            read(|c, r| {
                c.data(0, r.cookie, r.offset..r.offset + 512)?;
                c.data(DONE, r.cookie, r.offset + 1024..r.offset + u64::from(r.len))
            }),
            Fail(SourceIo, "not answered in full", at_start),
        ),
        fault(
            "bytes come twice",
            "which of the two is content?",
            read(|c, r| {
                c.data(0, r.cookie, r.offset..r.offset + 1024)?;
                c.data(DONE, r.cookie, r.offset + 512..r.offset + u64::from(r.len))
            }),
            Fail(SourceIo, "the same bytes twice", at_start),
        ),
        fault(
            "a hole covers what came as data",
            "which of the two is content?",
            read(|c, r| {
                c.data(0, r.cookie, r.offset..r.offset + 1024)?;
                let hole = [&r.offset.to_be_bytes()[..], &r.len.to_be_bytes()].concat();
                c.chunk(DONE, ZEROS, r.cookie, &hole)
            }),
            Fail(SourceIo, "the same bytes twice", at_start),
        ),
        fault(
            "a chunk begins before its request",
            "it would be written outside its buffer",
            read(|c, r| match r.offset {
                0 => c.answer_read(r),
                at => c.data(DONE, r.cookie, at - 1..at),
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk ends after its request",
            "it would be written outside its buffer",
            read(|c, r| c.data(DONE, r.cookie, r.offset..r.offset + u64::from(r.len) + 1)),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk is as long as can be said",
            LIMITS,
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, u32::MAX)?;
                c.send(&r.offset.to_be_bytes())
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk lies at the end of all numbers",
            "sums of it overflow",
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + 512)?;
                c.send(&(u64::MAX - 5).to_be_bytes())
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a hole is longer than its request",
            "it would be written outside its buffer",
            read(|c, r| {
                let hole = [&r.offset.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
                c.chunk(DONE, ZEROS, r.cookie, &hole)
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a hole has no length",
            BROKEN,
            read(|c, r| {
                let hole = [&r.offset.to_be_bytes()[..], &[0; 4]].concat();
                c.chunk(0, ZEROS, r.cookie, &hole)
            }),
            Fail(SourceIo, "bytes that were not asked for", at_start),
        ),
        fault(
            "a chunk of data has none",
            "it could come without end",
            read(|c, r| c.chunk(0, DATA, r.cookie, &r.offset.to_be_bytes())),
            Fail(SourceIo, "a chunk of kind 0x1 with 8 bytes", at_start),
        ),
        fault(
            "every other byte comes alone",
            LIMITS,
            read(|c, r| {
                for at in (r.offset..r.offset + u64::from(r.len)).step_by(2) {
                    c.data(0, r.cookie, at..at + 1)?;
                }
                Ok(())
            }),
            Fail(SourceIo, "an answer in crumbs", at_start),
        ),
        fault(
            "pieces come backwards",
            "any order is allowed",
            read(|c, r| {
                let half = r.offset + u64::from(r.len) / 2;
                c.data(0, r.cookie, half..r.offset + u64::from(r.len))?;
                c.data(0, r.cookie, r.offset..half)?;
                c.chunk(DONE, NONE, r.cookie, &[])
            }),
            Cope,
        ),
        fault(
            "there is more after the end of an answer",
            "the next answer would be taken for another",
            read(|c, r| {
                c.answer_read(r)?;
                c.data(DONE, r.cookie, r.offset..r.offset + 1)
            }),
            Fail(SourceIo, "a reply to no request", at_start),
        ),
        fault(
            "it reports an error",
            "nothing of it may be taken for content",
            read(|c, r| match r.offset {
                0 => c.fail(ERROR, r.cookie, EIO, b"bad sector"),
                _ => c.answer_read(r),
            }),
            Fail(
                SourceIo,
                "Input/output error (os error 5) (bad sector)",
                at_start,
            ),
        ),
        fault(
            "it reports an error and where",
            "the operator looks there",
            read(|c, r| {
                let body = [
                    &failure(EIO, b"bad sector")[..],
                    &(r.offset + 1024).to_be_bytes(),
                ]
                .concat();
                c.data(0, r.cookie, r.offset..r.offset + 1024)?;
                c.chunk(DONE, ERROR_AT, r.cookie, &body)
            }),
            Fail(SourceIo, "bad sector", Some(1024)),
        ),
        fault(
            "it reports an error of a kind that is not known",
            "an error is an error",
            read(|c, r| c.fail(1 << 15 | 99, r.cookie, EIO, b"so")),
            Fail(SourceIo, "Input/output error", at_start),
        ),
        fault(
            "it reports that nothing went wrong",
            BROKEN,
            read(|c, r| c.fail(ERROR, r.cookie, 0, b"")),
            Fail(SourceIo, "an error without an error", at_start),
        ),
        fault(
            "its error is as long as can be said",
            LIMITS,
            read(|c, r| c.chunk_head(DONE, ERROR, r.cookie, u32::MAX)),
            Fail(
                SourceIo,
                "a chunk of kind 0x8001 with 4294967295 bytes",
                at_start,
            ),
        ),
        fault(
            "its error says more than it has",
            "it would read on in the next reply",
            read(|c, r| c.chunk(DONE, ERROR, r.cookie, &[0, 0, 0, 5, 0xFF, 0xFF, b'x'])),
            Fail(SourceIo, "a chunk of kind 0x8001 with 7 bytes", at_start),
        ),
        fault(
            "its error plays with the terminal",
            "messages are shown to people",
            read(|c, r| c.fail(ERROR, r.cookie, EIO, b"\x1b]0;owned\x07")),
            Fail(SourceIo, "(?]0;owned?)", at_start),
        ),
        fault(
            "it does not answer",
            DEADLINE,
            read(|c, _| c.stall()),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it answers half and no more",
            DEADLINE,
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + r.len)?;
                c.send(&r.offset.to_be_bytes())?;
                c.send(&[1; 512])?;
                c.stall()
            }),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it answers a byte at a time",
            DEADLINE,
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + r.len)?;
                c.send(&r.offset.to_be_bytes())?;
                loop {
                    c.send(&[1])?;
                    std::thread::sleep(HASTY.reply / 20);
                }
            }),
            Fail(SourceIo, "in time", at_start),
        )
        .stalling(),
        fault(
            "it hangs up in the middle of an answer",
            "half an answer is none",
            read(|c, r| {
                c.chunk_head(DONE, DATA, r.cookie, 8 + r.len)?;
                c.send(&r.offset.to_be_bytes())?;
                c.hang_up()
            }),
            Fail(SourceIo, "closed the connection", at_start),
        ),
        fault(
            "the export shrinks meanwhile",
            "what is beyond its end is not zero, it is gone",
            read(|c, r| match r.offset {
                at if at >= 2 * MIB => c.fail(ERROR, r.cookie, 22, b"beyond the end"),
                _ => c.answer_read(r),
            }),
            Fail(SourceIo, "beyond the end", Some(2 * MIB)),
        ),
    ]);
}

#[test]
fn simple_reads() {
    use Code::SourceIo;
    fn simple(read: Answer) -> Manners {
        Manners {
            shake: |c| {
                c.shake(&Terms {
                    structured: false,
                    ..Terms::default()
                })
            },
            read,
            ..Manners::default()
        }
    }
    all_as_they_must(vec![
        fault(
            "the answer is for another cookie",
            BROKEN,
            simple(|c, r| c.simple(0, r.cookie + 1000, &[])),
            Fail(SourceIo, "a reply to no request", Some(0)),
        ),
        fault(
            "it reports an error",
            "nothing of it may be taken for content",
            simple(|c, r| match r.offset {
                0 => c.simple(EIO, r.cookie, &[]),
                _ => c.stall(),
            }),
            Fail(SourceIo, "Input/output error", Some(0)),
        ),
        fault(
            "it answers in chunks that were not agreed on",
            BROKEN,
            simple(|c, r| c.answer_read(r)),
            Fail(SourceIo, "something else than a reply", Some(0)),
        ),
        fault(
            "it answers half and no more",
            DEADLINE,
            simple(|c, r| {
                c.simple(0, r.cookie, &[1; 512])?;
                c.stall()
            }),
            Fail(SourceIo, "in time", Some(0)),
        )
        .stalling(),
    ]);
}
