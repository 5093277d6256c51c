//! What an agent's work is made of: turns of a model and calls of tools, what they
//! cost, and what comes next. Pure: everything is decided from what was stored.

pub mod conversation;
pub mod evaluate;
pub mod message;
pub mod price;
pub mod roles;
