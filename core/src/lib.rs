//! The truth of capx: what a playbook is, what state a run is in, and the one
//! transaction that moves it on.
//!
//! Three rooms, each knowing only those before it: [`domain`] is pure (no
//! clock, no I/O, no SQL), [`store`] is the only place with SQL, [`engine`]
//! holds the use cases: one function, one transaction.

pub mod domain;
pub mod engine;
pub mod failpoint;
pub mod store;
