//! The program `capx`, as a library for its tests.

pub mod api;
pub mod audit;
pub mod bench;
pub mod cli;
pub mod dev;
pub mod doctor;
pub mod keys;
pub mod out;
pub mod serve;
pub mod telemetry;
