"""What tests share: real servers, certificates, stores under test. Test files import it as `support`."""
