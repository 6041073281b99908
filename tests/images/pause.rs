//! The pause container of the lab: holds a pod's namespaces and does nothing, in as few pages as possible.

fn main() {
    loop {
        std::thread::park();
    }
}
