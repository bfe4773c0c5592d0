//! One target of tests/fuzz, the one that TARGET names, under libFuzzer.

#![no_main]

use std::sync::OnceLock;

#[path = "../../tests/fuzz/targets.rs"]
mod targets;

static CHOSEN: OnceLock<targets::Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let target = CHOSEN.get_or_init(|| {
        let name = std::env::var("TARGET").unwrap_or_default();
        let found = targets::TARGETS.iter().find(|(other, _)| *other == name);
        found.expect("TARGET names no target").1
    });
    target(data);
});
