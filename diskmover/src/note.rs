//! What an operator should know and nobody has to act on: a copy goes on, but not
//! as it does best. Each is told once; whoever runs the mover takes and logs them.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::pool::lock;

/// Notes that nobody takes are dropped, the oldest first.
const MOST: usize = 64;

static NOTES: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// Leaves a note the first time that `told` is false.
pub fn once(told: &AtomicBool, text: impl FnOnce() -> String) {
    if told.swap(true, Ordering::Relaxed) {
        return;
    }
    leave(text());
}

/// Leaves a note.
pub fn leave(text: String) {
    let mut notes = lock(&NOTES);
    if notes.len() == MOST {
        notes.pop_front();
    }
    notes.push_back(text);
}

/// Takes all notes left so far.
pub fn take() -> Vec<String> {
    lock(&NOTES).drain(..).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_told_once_and_the_newest_are_kept() {
        let mine = |text: &String| text.starts_with("a test");
        let told = AtomicBool::new(false);
        (0..2).for_each(|_| once(&told, || "a test, first".to_owned()));
        let noted = take();
        assert_eq!(noted.iter().filter(|text| mine(text)).count(), 1);
        for number in 0..=MOST {
            once(&AtomicBool::new(false), || format!("a test, {number}"));
        }
        let noted = take();
        assert!(noted.len() <= MOST);
        assert_eq!(noted.iter().rfind(|text| mine(text)).unwrap(), "a test, 64");
    }
}
