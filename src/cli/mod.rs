//! The client: what authors and operators type. It talks HTTP only, or, as far
//! as it needs no server, to nobody.

pub mod playbook;
