//! One file a resource.

pub(super) mod agents;
pub(super) mod approvals;
pub(super) mod companies;
pub(super) mod playbooks;
pub(super) mod runs;
mod templates;

use super::openapi::Routes;
