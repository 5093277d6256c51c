//! `capx dev`: everything in one process on a private PostgreSQL, for the
//! first two minutes and for a developer's every day.

pub mod fetch;
pub mod postgres;
