//! A limit on the wire: of all connections together, and whenever it is changed.

use std::time::Instant;

use diskmover::digest::CHUNK;
use diskmover::error::Code;
use diskmover::push::Push;

use crate::rig::{Rig, eventually, finish, noise};

#[test]
fn a_limit_holds_the_copy_up_until_it_is_lifted() {
    let rig = Rig::new();
    let size = 8 * CHUNK;
    let source = rig.source("disk", size, &[(0, &noise(3, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(1);
    let push = Push::start(job).unwrap();
    eventually("the label says so", || {
        (push.progress().limited_by == "throttle").then_some(())
    });
    assert!(push.progress().done <= CHUNK, "{:?}", push.progress());
    assert_eq!(
        push.set_limit(Some(0)).unwrap_err().code,
        Code::InvalidArgument
    );
    push.set_limit(None).unwrap();
    assert!(finish(&push).is_ok());
}

/// However slow this machine is: more time only allows for more.
#[test]
fn a_limit_counts_every_byte_of_every_connection() {
    let rig = Rig::new();
    let (size, rate) = (8 * CHUNK, 4 * CHUNK);
    let source = rig.source("disk", size, &[(0, &noise(3, size as usize))]);
    rig.open(&[("disk", size)]).unwrap();
    let mut job = rig.job(&[&source]);
    job.limit = Some(rate);
    (job.connections, job.most_connections) = (4, 4);
    let began = Instant::now();
    let push = Push::start(job).unwrap();
    eventually("most of it is there", || {
        let progress = push.progress();
        let allowed = rate as f64 * (began.elapsed().as_secs_f64() + 0.1);
        let frame = (CHUNK + 1024) as f64;
        assert!(progress.wire as f64 <= allowed + frame, "{progress:?}");
        push.set_limit(Some(rate)).unwrap(); // says nothing new
        (progress.done >= size - CHUNK).then_some(())
    });
    finish(&push).unwrap();
}
