//! Playbooks: what authors write, and the one model it becomes.
//!
//! [`yaml`] reads text into a tree that remembers where everything stands,
//! [`mod@load`] turns the tree into a [`Playbook`] and collects every problem
//! with its place, cause and suggestion, [`template`] is the language inside
//! `${…}`, [`inputs`] checks what a run is started with, [`mod@canonical`] is the
//! one way to write what the dialects say in several, [`mod@format`] its text,
//! [`mod@diff`] tells what two
//! versions mean differently, [`mod@rubric`] says what outputs must come up to, [`mod@schema`] helps editors, and [`keys`] is the table that
//! all of them share.

pub mod canonical;
mod comments;
pub mod diff;
pub mod expr;
pub mod format;
pub mod inputs;
pub mod keys;
pub mod load;
pub mod model;
pub mod problem;
pub mod rubric;
pub mod schema;
pub mod shape;
pub mod template;
mod url;
pub mod yaml;

pub use load::{load, read};
pub use model::{Approval, InputSpec, OnTimeout, Playbook, Retry, Step, Trigger};
pub use problem::Problem;

/// The largest playbook text, in bytes (hazard S10).
pub const YAML_BYTES_MAX: usize = 256 * 1024;
/// How deep a playbook may nest.
pub const YAML_DEPTH_MAX: usize = 32;
/// How many nodes a playbook may hold once aliases are followed.
pub const YAML_NODES_MAX: usize = 20_000;
/// How many steps a playbook may have.
pub const STEPS_MAX: usize = 1_000;
/// How many inputs a playbook may declare.
pub const INPUTS_MAX: usize = 100;
