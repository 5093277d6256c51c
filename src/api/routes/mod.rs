//! One file a resource.

pub(in crate::api) mod activity;
mod agent_config;
pub(super) mod agents;
pub(super) mod approvals;
pub(super) mod artifacts;
pub(super) mod audit;
pub(super) mod companies;
pub(super) mod costs;
pub(super) mod dead_letters;
pub(super) mod deliveries;
pub(super) mod exports;
pub(super) mod fleet;
pub(super) mod flow_limits;
pub(super) mod hooks;
pub(super) mod keys;
pub(super) mod memory;
pub(super) mod pauses;
pub(super) mod playbooks;
pub(super) mod redrives;
pub(super) mod retention;
pub(super) mod run_changes;
pub(super) mod run_items;
pub(super) mod runs;
pub(super) mod secrets;
pub(super) mod signals;
pub(super) mod tasks;
mod templates;
pub(super) mod webhooks;

use super::openapi::Routes;
