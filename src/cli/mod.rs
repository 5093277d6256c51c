//! The client: what authors and operators type. It talks HTTP only, or, as far
//! as it needs no server, to nobody.
//!
//! Every command ends with one of [`exit`]'s codes.

pub mod approval;
pub mod client;
pub mod exit;
pub mod offline;
pub mod playbook;
pub mod run;
pub mod secret;
pub mod show;
pub mod status;
mod stream;
pub mod webhook;
