//! One file a resource.

use std::sync::Arc;

use axum::Router;

use super::ApiState;

pub(super) mod agents;
pub(super) mod approvals;
pub(super) mod companies;
pub(super) mod playbooks;
pub(super) mod runs;

/// Routes of a resource.
type Routes = Router<Arc<ApiState>>;
