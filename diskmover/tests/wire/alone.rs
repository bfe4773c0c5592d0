//! Tests of what a whole process has: each in a process of its own, this program
//! running that test alone.

use std::process::Command;

/// Says that this is the process of a test.
const ALONE: &str = "DISKMOVER_TEST_ALONE";

/// Runs `test`, whose path is given too, in a process of its own.
pub fn alone(path: &str, test: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let mut program = Command::new(std::env::current_exe().unwrap());
    let run = program.args(["--exact", path]).env(ALONE, "1").output();
    let out = run.unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
}
