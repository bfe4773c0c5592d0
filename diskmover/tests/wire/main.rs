//! Both ends over real sockets and real mutual TLS, and peers that misbehave.

#![allow(missing_docs)]

mod access;
mod alone;
mod black_holes;
mod broken_wire;
mod budget;
mod copies;
mod corrupt;
mod costly_sender;
mod devices;
mod hostile_nbd;
mod hostile_receiver;
mod hostile_sender;
mod limit;
mod memory;
mod passes;
mod peer;
mod pki;
mod proof;
mod receipts;
mod relay;
mod remote;
mod revisions;
mod rig;
#[allow(dead_code)]
mod sample;
mod seeds;
mod stalled;
mod watched;
