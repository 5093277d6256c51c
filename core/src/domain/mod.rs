//! Pure decisions. Nothing here reads a clock, draws randomness on its own,
//! does I/O or knows SQL: what varies is an argument, so that every rule can
//! be tested as a function.

pub mod address;
pub mod agent;
pub mod artifact;
pub mod audit;
pub mod backoff;
pub mod budget;
pub mod company;
pub mod delivery;
pub mod digest;
pub mod duration;
pub mod event;
pub mod flow;
pub mod forecast;
pub mod governance;
pub mod heartbeat;
pub mod ids;
pub mod key;
pub mod money;
pub mod outcome;
pub mod plan;
pub mod playbook;
pub mod retention;
pub mod run;
pub mod schedule;
pub mod secret;
pub mod storable;
pub mod task;
pub mod tool;
pub mod webhook;
